"""Tiny models, tiny records, and whole training runs inside the worker pool."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from titan_hd.config import manager
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import parse_hf_config
from titan_hd.preflight import plan_run

# Shapes on purpose odd: 37 and 22 rows divide by neither 2 nor 4 workers; 6 rows of k and v leave the last of four
# workers an empty shard; grouped-query attention; a head of 50 rows.
ODD = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 22,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


LINEAR_LAYERS = list(parse_hf_config(ODD, "tests").linear_shapes())


def write_model(folder: Path, seed: int = 0, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """A HF directory with random fp32 weights, large enough that gradients matter; returns its config and weights."""
    config = {**ODD, **changes}
    d, ffn, c = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * c, config["num_key_value_heads"] * c
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {f"{p}{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        shapes |= {f"{p}self_attn.q_proj.weight": (q, d), f"{p}self_attn.o_proj.weight": (d, q)}
        shapes |= {f"{p}self_attn.{n}_proj.weight": (kv, d) for n in "kv"}
        shapes |= {f"{p}mlp.{n}_proj.weight": (ffn, d) for n in ("gate", "up")}
        shapes[f"{p}mlp.down_proj.weight"] = (d, ffn)
    with torch.device("meta"):  # what variants have besides: biases, norms of q and k
        model = Decoder(parse_hf_config(config, "tests"))
    shapes |= {name: tuple(w.shape) for name, w in model.named_parameters() if name not in shapes}
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return config, weights


def write_records(path: Path, count: int = 24, vocab_size: int = 50, seed: int = 0) -> list[dict]:
    """Token records of unequal lengths and very unequal numbers of labels, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        length = int(torch.randint(4, 17, (), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length - 1, (), generator=generator))
        records.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def options(model: Path, records: Path, dump: Path, **overrides) -> list[str]:
    """Command-line options of a tiny fp32 run; override with section__key=value."""
    values = {
        "model.hf_assets_path": model,
        "data.train": records,
        "data.format": "tokens",
        "data.shuffle": "false",
        "job.dump_folder": dump,
        "training.steps": 4,
        "training.seq_len": 16,
        "training.mixed_precision_param": "float32",
        "optimizer.lr": 1e-2,
        "lr_scheduler.decay_type": "constant",
        "adapter.rank": 1,
        "export.enable": "true",
        "export.dtype": "float32",
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def trainer(argv: list[str]):
    """A quiet Trainer on this rank of the worker pool."""
    import torch.distributed as dist

    from titan_hd.console import init_logging
    from titan_hd.train import Trainer

    init_logging(rank=1)
    config = manager.load(argv)
    return Trainer(config, plan_run(config, dist.get_world_size()), torch.device("cpu"))


def train(argv: list[str], stop_after: int | None = None) -> list[float]:
    """Run on this rank of the worker pool; the loss of every step. Importable, so that the pool can call it.

    stop_after: save a checkpoint and leave after so many steps, as a run that is interrupted there.
    """
    run, losses = trainer(argv), []
    if stop_after is None:
        run.add_hook(1, lambda result: losses.append(result.loss))
        run.train()
    else:
        losses = [run.train_step().loss for _ in range(stop_after)]
        run.save()
    run.close()
    return losses


def train_traced(argv: list[str]) -> list[float]:
    """`train` with blocks that are traced (fullgraph) and differentiated by the compiler, but not turned into C++."""
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        return train(argv)


def exported(dump: Path) -> dict[str, torch.Tensor]:
    return load_file(dump / "hf" / "model.safetensors")


def delta_error(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, float]:
    """||dW - dW_ref|| / ||dW_ref|| of every weight that the reference changed."""
    errors = {}
    for name, reference in want.items():
        delta = reference.double() - start[name].double()
        if delta.norm() > 0:
            errors[name] = ((got[name].double() - reference.double()).norm() / delta.norm()).item()
    return errors
