"""config.json and the published sizes: both forms of RoPE settings, refusals by name, true parameter counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from titan_hd.models.decoder import Decoder, rope_frequencies
from titan_hd.models.registry import FLAVORS, flavor_config, parse_hf_config, read_hf_config

SMALL = FLAVORS["llama3"]["debugmodel"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes):
    """The small configuration with some keys changed; a key set to ... is taken out."""
    raw = {**SMALL, **changes}
    return parse_hf_config({k: v for k, v in raw.items() if v is not ...}, "here/config.json")


class TestRope:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (
                {"rope_theta": 500000.0, "rope_scaling": None},
                {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            ),
            (
                {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
                {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}},
            ),
            (
                {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
                {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
            ),
            (
                {"rope_theta": ..., "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
                {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            ),
        ],
        ids=["default", "llama3", "linear", "no-theta"],
    )
    def test_both_forms_agree(self, old: dict, new: dict):
        before, after = parse(**old), parse(rope_theta=..., rope_scaling=..., **new)
        assert before.rope_theta == after.rope_theta
        assert before.rope_scaling == after.rope_scaling
        assert torch.equal(rope_frequencies(before), rope_frequencies(after))

    def test_theta_inside_wins_over_theta_beside(self):
        """transformers 5 reads rope_parameters alone."""
        config = parse(rope_theta=10000.0, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        assert config.rope_theta == 500000.0

    def test_default_scaling_is_none(self):
        assert parse(rope_scaling={"rope_type": "default"}).rope_scaling is None
        assert parse(rope_scaling=None).rope_scaling is None

    def test_the_caller_keeps_its_table(self):
        raw = {**SMALL, "rope_scaling": dict(LLAMA3_ROPE), "rope_theta": 7.0}
        before = json.dumps(raw)
        assert parse_hf_config(raw, "x").hf == raw
        assert json.dumps(raw) == before

    @pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
    @pytest.mark.parametrize("key", ["type", "rope_type"])
    def test_other_types_are_refused_by_name(self, kind: str, key: str):
        with pytest.raises(ValueError, match=rf"here/config.json: rope_scaling: type '{kind}' is not supported"):
            parse(rope_scaling={key: kind, "factor": 2.0})

    def test_partial_rotation_is_refused(self):
        with pytest.raises(ValueError, match="partial_rotary_factor: is not supported"):
            parse(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})

    @pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
    def test_a_missing_rope_key_is_named(self, key: str):
        scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != key}
        with pytest.raises(ValueError, match=f"here/config.json.*{key}"):
            parse(rope_scaling=scaling)


class TestRefusals:
    @pytest.mark.parametrize(
        "architectures", [..., None, [], ["GPT2LMHeadModel"], ["LlamaForCausalLM"] * 2, ["LlamaModel"]]
    )
    def test_architecture(self, architectures):
        with pytest.raises(ValueError, match=r"here/config.json: architectures: .* is not supported; supported are Ll"):
            parse(architectures=architectures)

    def test_activation(self):
        with pytest.raises(ValueError, match=r"here/config.json: hidden_act: 'gelu' is not supported; only silu"):
            parse(hidden_act="gelu")

    def test_quantization(self):
        with pytest.raises(ValueError, match=r"here/config.json: quantization_config: quantized weights are not supp"):
            parse(quantization_config={"quant_method": "bitsandbytes"})

    @pytest.mark.parametrize(
        "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    )
    def test_missing_key(self, key: str):
        with pytest.raises(ValueError, match=f"here/config.json: {key}: is missing"):
            parse(**{key: ...})

    def test_heads_that_do_not_divide(self):
        with pytest.raises(ValueError, match=r"here/config.json: num_key_value_heads: must divide .*\(4\)"):
            parse(num_key_value_heads=3)

    def test_null_says_where(self):
        with pytest.raises(ValueError, match=r"here/config.json: "):
            parse(vocab_size=None)

    def test_a_word_for_a_number_says_where(self):
        with pytest.raises(ValueError, match=r"here/config.json: "):
            parse(vocab_size="many")


class TestDefaults:
    def test_what_old_files_leave_out(self):
        config = parse(num_key_value_heads=..., head_dim=..., tie_word_embeddings=..., rope_theta=..., rms_norm_eps=...)
        assert config.num_key_value_heads == config.num_attention_heads == 4
        assert config.head_dim == 16
        assert config.rope_theta == 10000.0
        assert config.rms_norm_eps == 1e-6
        assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)

    def test_window_belongs_to_mistral(self):
        assert parse(sliding_window=8).sliding_window is None
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        assert parse(sliding_window=8, **mistral).sliding_window == 8
        assert parse(sliding_window=None, **mistral).sliding_window is None


class TestReading:
    def write(self, folder: Path, content: str) -> Path:
        (folder / "config.json").write_text(content)
        return folder

    def test_family_by_name(self, tmp_path: Path):
        folder = self.write(tmp_path, json.dumps(SMALL))
        assert read_hf_config(folder) == read_hf_config(folder, "llama3") == read_hf_config(folder, "llama2")
        with pytest.raises(ValueError, match=r"model.name: .* is of the family llama2 or llama3, not 'mistral'"):
            read_hf_config(folder, "mistral")

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"model.hf_assets_path: cannot read .*config.json: No such file"):
            read_hf_config(tmp_path)

    @pytest.mark.parametrize(("content", "says"), [("{", "not valid JSON"), ("[1]", "must be a JSON object")])
    def test_broken_file(self, tmp_path: Path, content: str, says: str):
        with pytest.raises(ValueError, match=f"config.json: {says}"):
            read_hf_config(self.write(tmp_path, content))


class TestFlavors:
    @pytest.mark.parametrize(
        ("name", "flavor", "count"),
        [("llama2", "7B", 6738415616), ("llama3", "8B", 8030261248), ("mistral", "7B", 7241732096)],
    )
    def test_published_parameter_counts(self, name: str, flavor: str, count: int):
        """The counts that the model cards' checkpoints have, on the meta device."""
        with torch.device("meta"):
            model = Decoder(flavor_config(name, flavor))
        assert sum(p.numel() for p in model.parameters()) == count

    @pytest.mark.parametrize(("name", "flavor"), [(n, f) for n, flavors in FLAVORS.items() for f in flavors])
    def test_linear_shapes_are_the_decoders(self, name: str, flavor: str):
        config = flavor_config(name, flavor)
        with torch.device("meta"):
            model = Decoder(config)
        for block in model.model.layers:
            linears = {n.rpartition(".")[2]: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
            assert {n: tuple(m.weight.shape) for n, m in linears.items()} == config.linear_shapes()

    def test_unknown_names(self):
        with pytest.raises(ValueError, match=r"model.name: must be one of llama2, llama3, mistral.*, not 'gpt'"):
            flavor_config("gpt", "8B")
        with pytest.raises(ValueError, match=r"model.flavor: must be one of .*8B.* for llama3, not '9B'"):
            flavor_config("llama3", "9B")
