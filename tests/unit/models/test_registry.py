"""config.json and the published sizes: both forms of RoPE settings, refusals by name, true parameter counts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from titan_hd.adapters.inject import find_linears
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import FLAVORS, build_model, flavor_config, parse_hf_config, read_hf_config
from titan_hd.models.rope import rope_frequencies

SMALL = FLAVORS["llama3"]["debugmodel"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
TYPES = ["sliding_attention", "full_attention"]


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
            parse(architectures=architectures, model_type="gpt2")

    @pytest.mark.parametrize("architectures", [..., None, []])
    @pytest.mark.parametrize("said", [SMALL, MISTRAL, QWEN2, QWEN3])
    def test_a_model_type_stands_for_its_architecture(self, architectures, said: dict):
        """As in transformers; an export names it, for vLLM."""
        want = parse(**{"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, **said})
        got = parse(**{"num_key_value_heads": 2, **said, "architectures": architectures})
        assert got == want
        assert got.hf["architectures"] == want.hf["architectures"]

    def test_a_model_type_of_another_architecture(self):
        """transformers would compute a Mistral with its window, vLLM a Llama."""
        with pytest.raises(
            ValueError, match=r"architectures \['LlamaForCausalLM'\] and model_type 'mistral' contradict"
        ):
            parse(model_type="mistral")
        assert parse(model_type="yi") == parse()

    def test_activation(self):
        with pytest.raises(ValueError, match=r"here/config.json: hidden_act: 'gelu' is not supported; only silu"):
            parse(hidden_act="gelu")
        assert parse(hidden_act="swish") == parse(hidden_act="silu")

    def test_quantization(self):
        with pytest.raises(ValueError, match=r"here/config.json: quantization_config: is not supported"):
            parse(quantization_config={"quant_method": "bitsandbytes"})

    @pytest.mark.parametrize(
        "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    )
    def test_sizes_are_numbers(self, key: str):
        """config.json comes with somebody's weights: no size of it may reach an allocation unchecked."""
        for wrong in (0, -1, 1.5, True, "many", [4], 2**40, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=rf"^here/config.json: {key}: must be "):
                parse(**{key: wrong})

    @pytest.mark.parametrize(
        "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    )
    def test_missing_key(self, key: str):
        with pytest.raises(ValueError, match=f"here/config.json: {key}: is missing"):
            parse(**{key: ...})

    def test_heads_that_do_not_divide(self):
        with pytest.raises(ValueError, match=r"here/config.json: num_key_value_heads: must divide .*\(4\)"):
            parse(num_key_value_heads=3)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"vocab_size": None}, "vocab_size: is missing"),
            ({"architectures": [["x"]]}, "architectures: [['x']] is not supported"),
            ({"architectures": [{}]}, "architectures: [{}] is not supported"),
            ({"rope_scaling": {"rope_type": ["x"]}}, "rope_scaling: type ['x'] is not supported"),
            ({"vocab_size": 10**400}, "vocab_size: must be a number above 0"),
            ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 8}, "hidden_size: a weight of more than"),
            ({"num_hidden_layers": 10**6}, "num_hidden_layers: must be at most 1000"),
            (
                {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_ROPE},
                "rope_parameters and rope_scaling contradict each other",
            ),
            (
                {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
                "rope_scaling: type and rope_type contradict each other",
            ),
            ({"head_dim": 5}, "head_dim: must be even for rotary embeddings, not 5"),
            ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false, not 'yes'"),
            ({"rms_norm_eps": -1.0}, "rms_norm_eps: must be a number above 0"),
            ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not supported"),
            ({"num_local_experts": 8}, "num_local_experts: 8 is not supported"),
            ({"rope_scaling": [1]}, "rope_parameters: must be one table"),
            ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters: must be one table"),
            ({"rope_theta": "ten"}, "rope_theta: must be a number above 0"),
            ({**QWEN3, "layer_types": ["full_attention"]}, "layer_types: must name full_attention or sliding_attent"),
            ({**QWEN3, "layer_types": ["full_attention", "linear_attention"]}, "layer_types: must name full_attention"),
            ({**QWEN2, "use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers: must be a whole num"),
        ],
    )
    def test_one_line_with_the_key(self, changes: dict, says: str):
        with pytest.raises(ValueError, match=rf"^here/config.json: {re.escape(says)}"):
            parse(**changes)


class TestDefaults:
    def test_what_old_files_leave_out(self):
        config = parse(num_key_value_heads=..., head_dim=..., tie_word_embeddings=..., rope_theta=..., rms_norm_eps=...)
        assert config.num_key_value_heads == config.num_attention_heads == 4
        assert config.head_dim == 16
        assert config.rope_theta == 10000.0
        assert config.rms_norm_eps == 1e-6
        assert not any((config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm))


class TestVariants:
    @pytest.mark.parametrize(
        ("changes", "windows"),
        [
            ({"sliding_window": 8}, (None, None)),  # Llama has none
            ({**MISTRAL, "sliding_window": 8}, (8, 8)),
            ({**MISTRAL, "sliding_window": None}, (None, None)),
            (MISTRAL, (4096, 4096)),
            ({**QWEN2, "sliding_window": 8}, (None, None)),
            ({**QWEN2, "sliding_window": 8, "use_sliding_window": True}, (None, None)),  # from layer 28 on
            ({**QWEN2, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (None, 8)),
            ({**QWEN3, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, (8, 8)),
            ({**QWEN3, "sliding_window": 8, "use_sliding_window": True, "layer_types": TYPES}, (8, None)),
            ({**QWEN3, "sliding_window": None, "use_sliding_window": False, "layer_types": TYPES}, (None, None)),
        ],
    )
    def test_windows(self, changes: dict, windows: tuple):
        """As transformers derives them; the decoder's tests compare the logits."""
        assert parse(**changes).layer_windows == windows

    @pytest.mark.parametrize(
        ("changes", "biases"),
        [
            ({}, (False, False, False)),
            ({"attention_bias": True}, (True, True, False)),
            ({"mlp_bias": True}, (False, False, True)),
            (MISTRAL, (False, False, False)),
            (QWEN2, (True, False, False)),
            (QWEN3, (False, False, False)),
            ({**QWEN3, "attention_bias": True}, (True, True, False)),
        ],
    )
    def test_biases(self, changes: dict, biases: tuple):
        config = parse(**changes)
        assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases

    def test_qwen3s_heads_have_128_channels_unless_said(self):
        assert parse(**QWEN3).head_dim == 128
        assert parse(**QWEN3, head_dim=16).head_dim == 16

    @pytest.mark.parametrize("family", [MISTRAL, QWEN2, QWEN3])
    def test_others_than_llama_must_say_their_key_heads(self, family: dict):
        """transformers' defaults for a missing key are no function of the other keys."""
        with pytest.raises(ValueError, match="num_key_value_heads: is missing"):
            parse(**family, num_key_value_heads=...)


class TestIgnored:
    def test_what_is_ignored_is_named(self):
        config = parse(attention_dropout=0.1, auto_map={"AutoModel": "code.py"}, something_new=3, use_cache=True)
        assert config.ignored == ("attention_dropout", "auto_map", "something_new")

    def test_windows_of_a_family_that_has_none(self):
        assert parse(sliding_window=8, use_sliding_window=True).ignored == ("sliding_window", "use_sliding_window")
        assert parse(**QWEN2, sliding_window=8, use_sliding_window=False).ignored == ()

    def test_biases_that_mistral_never_reads(self):
        assert parse(**MISTRAL, attention_bias=True).ignored == ("attention_bias",)

    @pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
    def test_nothing_that_transformers_writes_by_itself(self, model_type: str):
        transformers = pytest.importorskip("transformers")
        written = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
        architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
        written["architectures"] = [f"{architecture}ForCausalLM"]
        assert parse_hf_config(written, "x").ignored == ()


class TestReading:
    def write(self, folder: Path, content: str) -> Path:
        (folder / "config.json").write_text(content)
        return folder

    def test_family_by_name(self, tmp_path: Path):
        folder = self.write(tmp_path, json.dumps(SMALL))
        assert read_hf_config(folder) == read_hf_config(folder, "llama3") == read_hf_config(folder, "llama2")
        with pytest.raises(
            ValueError, match=r"model.name: .* is of the family llama2 or llama3 or smollm2, not 'mistral'"
        ):
            read_hf_config(folder, "mistral")

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"model.hf_assets_path: cannot read .*config.json: no such file"):
            read_hf_config(tmp_path)

    def test_a_pipe_and_a_device_do_not_hang(self, tmp_path: Path):
        os.mkfifo(tmp_path / "config.json")
        with pytest.raises(ValueError, match=r"config.json: cannot be read: it is no regular file"):
            read_hf_config(tmp_path)
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=r"config.json: cannot be read: it is no regular file"):
            read_hf_config(tmp_path)

    def test_ignored_keys_are_named_in_the_log(self, tmp_path: Path, caplog):
        read_hf_config(self.write(tmp_path, json.dumps({**SMALL, "qk_clip": 3})))
        assert "config.json: ignored keys: qk_clip" in caplog.text

    @pytest.mark.parametrize(
        ("content", "says"), [("{", "not valid JSON"), ("[1]", "not valid JSON: must be an object")]
    )
    def test_broken_file(self, tmp_path: Path, content: str, says: str):
        with pytest.raises(ValueError, match=f"config.json: {says}"):
            read_hf_config(self.write(tmp_path, content))


class TestFlavors:
    @pytest.mark.parametrize(
        ("name", "flavor", "count"),
        [
            ("llama2", "7B", 6738415616),
            ("llama2", "13B", 13015864320),
            ("llama2", "70B", 68976648192),
            ("llama3", "1B", 1235814400),
            ("llama3", "3B", 3212749824),
            ("llama3", "8B", 8030261248),
            ("llama3", "70B", 70553706496),
            ("mistral", "7B", 7241732096),
            ("qwen2", "0.5B", 494032768),
            ("qwen2", "1.5B", 1543714304),
            ("qwen2", "7B", 7615616512),
            ("qwen3", "0.6B", 596049920),
            ("qwen3", "4B", 4022468096),
            ("qwen3", "8B", 8190735360),
            ("smollm2", "135M", 134515008),
            ("smollm2", "360M", 361821120),
            ("smollm2", "1.7B", 1711376384),
        ],
    )
    def test_published_parameter_counts(self, name: str, flavor: str, count: int):
        """The counts that the model cards' checkpoints have, on the meta device."""
        with torch.device("meta"):
            model = Decoder(flavor_config(name, flavor))
        assert sum(p.numel() for p in model.parameters()) == count

    @pytest.mark.parametrize(("name", "flavor"), [(n, f) for n, flavors in FLAVORS.items() for f in flavors])
    def test_linear_shapes_are_the_models(self, name: str, flavor: str):
        config = flavor_config(name, flavor)
        with torch.device("meta"):
            model = build_model(config)
        shapes = {config.linear_paths()[kind]: shape for kind, shape in config.linear_shapes().items()}
        for block in model.blocks():
            linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
            assert {n: tuple(m.weight.shape) for n, m in linears.items()} == shapes
        assert find_linears(model, None) == list(config.linear_layers())

    def test_unknown_names(self):
        with pytest.raises(ValueError, match=r"model.name: must be one of llama2, llama3, mistral.*, not 'gpt'"):
            flavor_config("gpt", "8B")
        with pytest.raises(ValueError, match=r"model.flavor: must be one of .*8B.* for llama3, not '9B'"):
            flavor_config("llama3", "9B")
