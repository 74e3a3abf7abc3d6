"""What activation checkpointing costs the host, and what it keeps: forward and backward pass of a decoder.

    python -m benchmarks.bench_checkpointing                # 32 layers of tiny shapes: nearly all time is the host's
    python -m benchmarks.bench_checkpointing --hidden 512 --intermediate 1792 --head-dim 128 --tokens 256 --layers 2 \
        --dtype bfloat16 --repetitions 1                    # an eighth of the widths of Llama-3.1-8B, for the memory

Every layer has a LoRA adapter, or is HD-PiSSA's; FSDP2 wraps the blocks on one worker, as in a run. Variants:

    none            everything is kept
    selective       activation_checkpoint.mode = "selective" with the default keep
    keep gate_up    selective, q, k and v computed again
    keep qkv        selective, gate and up computed again
    keep nothing    selective with keep = []: the residual stream and attention's result alone are kept
    full            each block is recomputed
    dispatch mode   torch's selective checkpoint, a Python function asked for every operation: what to beat

Ratios are medians over interleaved repetitions of (variant / none in the same repetition), in processor time of this
process. Kept: bytes per token and layer that live between the forward and the backward pass, beyond the weights.
Expected of selective: at most 1.3 times the host time of none.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks import common
from titan_hd.adapters.hdpissa import HDPissaLinear, project_together
from titan_hd.adapters.inject import replace_linears
from titan_hd.adapters.lora import LoRA
from titan_hd.adapters.shared_products import let_share
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import apply_activation_checkpointing, apply_fsdp
from titan_hd.models.model import Model
from titan_hd.models.registry import build_model, parse_hf_config

VARIANTS = {
    "none": None,
    "selective": ("selective", ("qkv", "gate_up")),
    "keep gate_up": ("selective", ("gate_up",)),
    "keep qkv": ("selective", ("qkv",)),
    "keep nothing": ("selective", ()),
    "full": ("full", ()),
}


class Kept(TorchDispatchMode):
    """Bytes of the storages that operations inside the context made, and that still live and have bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = weakref.ref(storage)
        return result

    def bytes(self, but_not: set[int]) -> int:
        """but_not: `_cdata` of storages that do not count."""
        alive = {key: made() for key, made in self._made.items() if key not in but_not}
        return sum(storage.nbytes() for storage in alive.values() if storage is not None)


def dispatch_contexts():
    """Keep attention's results and every second matrix product."""
    products = {"forward": 0, "recompute": 0}

    def policy(ctx, op, *args, **kwargs):
        if op is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            return CheckpointPolicy.MUST_SAVE
        if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            phase = "recompute" if ctx.is_recompute else "forward"
            products[phase] += 1
            if products[phase] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def build(args: argparse.Namespace, dtype: torch.dtype) -> Model:
    heads = args.hidden // args.head_dim
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "vocab_size": 64}
    sizes |= {"num_hidden_layers": args.layers, "num_attention_heads": heads, "head_dim": args.head_dim}
    sizes |= {"num_key_value_heads": max(1, heads // 4), "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = build_model(parse_hf_config({**fixed, **sizes, "max_position_embeddings": 8192}, "benchmark")).to(dtype)
    if args.method == "lora":
        LoRA(rank=args.rank, scale=1.0).apply(model, None)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.02)
    else:
        model.requires_grad_(False)
        replace_linears(model, None, lambda linear: HDPissaLinear(linear, 1.0, 0.0, 0.0))
        for layer in (module for module in model.modules() if isinstance(module, HDPissaLinear)):
            a, b = torch.randn(args.rank, layer.in_features), torch.randn(layer.out_features, args.rank)
            layer.bind(a, b, torch.zeros_like(a, requires_grad=True), torch.zeros_like(b, requires_grad=True))
        let_share(model, project_together)
    return model


def variants(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Model]:
    dims, models = ParallelDims(1, 1, "cpu"), {}
    for name in [*VARIANTS, "dispatch mode"]:
        model = build(args, dtype)
        if name == "dispatch mode":
            for block in model.blocks():
                options = {"use_reentrant": False, "context_fn": dispatch_contexts}
                block.forward = functools.partial(checkpoint, block.forward, **options)
        elif choice := VARIANTS[name]:
            apply_activation_checkpointing(model, *choice)
        apply_fsdp(model, dims, set(), dtype)
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(False)
        models[name] = model
    return models


def kept_bytes(model: Model, forward: Callable[[], torch.Tensor], args: argparse.Namespace) -> float:
    """Per token and layer. What the last norm and the head keep counts too: a share of one layer's."""
    forward().backward()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    with Kept() as kept:
        loss = forward()
        found = kept.bytes(weights)
    loss.backward()
    return found / args.tokens / args.layers


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--method", choices=["lora", "hdpissa"], default="hdpissa")
    parser.add_argument("--dtype", default="float32")
    for name, default in [("hidden", 16), ("intermediate", 16), ("head-dim", 4), ("tokens", 8), ("layers", 32)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    environment = common.environment(device, 1)
    common.print_header("Host time and memory of activation checkpointing", environment)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        models, ids = variants(args, getattr(torch, args.dtype)), torch.arange(args.tokens)[None] % 64

        def forward(model: Model) -> torch.Tensor:
            return model(ids).float().sum()

        passes = {name: functools.partial(forward, model) for name, model in models.items()}
        calls = {name: (lambda one=one: one().backward()) for name, one in passes.items()}
        timing = common.interleave(calls, device, args.repetitions)
        kept = {name: kept_bytes(models[name], one, args) for name, one in passes.items()}
        dist.destroy_process_group()
    milliseconds = {name: 1e3 * value for name, value in common.medians(timing.cpu).items()}
    ratios = {name: common.median_ratio(timing.cpu, name, "none") for name in passes}
    rows = [[name, round(milliseconds[name], 1), round(ratios[name], 2), round(kept[name])] for name in passes]
    common.print_table(["variant", "processor ms", "of none", "kept bytes/token/layer"], rows)
    results = {"milliseconds": milliseconds, "ratios": ratios, "kept": kept}
    print(
        json.dumps(
            {"benchmark": "checkpointing", "environment": environment, "arguments": vars(args), "results": results}
        )
    )


if __name__ == "__main__":
    main()
