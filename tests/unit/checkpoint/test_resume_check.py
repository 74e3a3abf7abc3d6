"""Which runs may resume from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_hd.checkpoint.resume_check import (
    allow_mismatch_errors,
    check_resumable,
    check_unfolded,
    run_identity,
    weights_fingerprint,
)
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.models.registry import FLAVORS, parse_hf_config

SMALL = FLAVORS["llama3"]["debugmodel"]
ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
}
IDENTITY = {"adapter.method": "hdpissa", "adapter.rank": 16, "adapter.target_modules": None, "training.seed": 42}


def compare(saved: dict, current: dict, allowed: list[str] = [], base: str = "full") -> list[str]:  # noqa: B006
    return check_resumable({"base": base, "identity": saved}, current, allowed)


class TestCheckResumable:
    def test_the_same_run(self):
        assert compare(json.loads(json.dumps(IDENTITY)), IDENTITY) == []

    def test_targets_are_a_set(self):
        saved = {**IDENTITY, "adapter.target_modules": ["q_proj", "v_proj"]}
        assert compare(saved, {**IDENTITY, "adapter.target_modules": ["v_proj", "q_proj", "v_proj"]}) == []
        for other in (["q_proj"], ["q_proj", "k_proj"], None):
            with pytest.raises(UserError, match=r"adapter\.target_modules: the checkpoint has"):
                compare(saved, {**IDENTITY, "adapter.target_modules": other})

    def test_keys_of_a_config_in_another_order(self):
        texts = [
            repr(parse_hf_config({**SMALL, "rope_scaling": rope}, "x")) for rope in (ROPE, dict(sorted(ROPE.items())))
        ]
        assert texts[0] != texts[1]
        assert compare({"model": texts[0]}, {"model": texts[1]}) == []
        other = repr(parse_hf_config({**SMALL, "rope_scaling": {**ROPE, "factor": 4.0}}, "x"))
        with pytest.raises(UserError, match=r"^model: the checkpoint has"):
            compare({"model": texts[0]}, {"model": other})

    def test_every_difference_is_a_line_that_names_its_key(self):
        current = {**IDENTITY, "adapter.rank": 8, "adapter.target_modules": ["q_proj"]}
        with pytest.raises(UserError) as caught:
            compare(IDENTITY, current)
        first, second = str(caught.value).split("\n")
        assert first.startswith("adapter.rank: the checkpoint has 16, this run 8; ")
        assert second.startswith("adapter.target_modules: the checkpoint has None, this run ['q_proj']; ")
        assert "checkpoint.load_step = 0" in first
        assert "allow_mismatch" not in first

    def test_what_may_differ_says_so_and_does_when_named(self):
        current = {**IDENTITY, "training.seed": 1}
        with pytest.raises(UserError, match=r'or checkpoint.allow_mismatch = \["training.seed"\]'):
            compare(IDENTITY, current)
        assert compare(IDENTITY, current, ["training.seed"]) == ["training.seed: the checkpoint has 42, this run 1"]

    def test_k_says_why_it_cannot(self):
        with pytest.raises(UserError, match=r"has 4, this run 2 .each adapter has its own slice .* stays"):
            compare({"hdpissa.num_adapters": 4}, {"hdpissa.num_adapters": 2})

    def test_a_key_that_only_one_side_has(self):
        with pytest.raises(UserError, match=r"training.seed: the checkpoint has None, this run 42"):
            compare({}, {"training.seed": 42})
        assert compare({**IDENTITY, "of.old": 1}, IDENTITY) == []
        assert compare({}, {"hdpissa.factor_scale": "root", "hdpissa.samples": "own"}) == [], (
            "saved before there was it"
        )
        assert len(compare({}, {"hdpissa.samples": "all"}, ["hdpissa.samples"])) == 1
        with pytest.raises(UserError, match=r"factor_scale: the checkpoint has 'root', this run 'unit'"):
            compare({}, {"hdpissa.factor_scale": "unit"})
        with pytest.raises(UserError, match=r"refresh_steps: the checkpoint has 0, this run 10; set it back, or check"):
            compare({}, {"hdpissa.refresh_steps": 10})
        assert compare({}, {"hdpissa.local_steps": 1}) == []
        assert len(compare({}, {"hdpissa.local_steps": 4}, ["hdpissa.local_steps"])) == 1

    def test_the_base_model(self):
        """Not needed for a full checkpoint, if it is not at hand; never another one for a delta."""
        assert compare({"weights": "a"}, {"weights": ""}) == []
        assert len(compare({"weights": "a"}, {"weights": "b"}, ["weights"])) == 1
        with pytest.raises(UserError, match="weights: "):
            compare({"weights": "a"}, {"weights": "b"}, ["weights"], base="delta")

    def test_what_cannot_be_allowed(self):
        (line,) = allow_mismatch_errors(["training.seed", "adapter.rank"])
        assert line.startswith("checkpoint.allow_mismatch: 'adapter.rank' cannot differ; only ")


SAVED = {"hdpissa.local_steps": 4, "hdpissa.aggregate": "mean", "hdpissa.samples": "own", "hdpissa.mute_scalar": 0.0}
BETWEEN, INT8 = ("model.w", "residuals.l.delta_A", "unfolded.rates"), ("model.w", "residuals.l.delta_A")
OTHER = [("local_steps", 2), ("local_steps", 1), ("aggregate", "sum"), ("samples", "all"), ("mute_scalar", 1e-16)]


class TestCheckUnfolded:
    """What waits in dA and dB: of step 6 with L = 4, and what int8 leaves at a fold."""

    def check(self, stored: tuple[str, ...], ends: str = "", step: int = 6, **changes) -> str | None:
        current = SAVED | {f"hdpissa.{key}": value for key, value in changes.items()}
        return check_unfolded({"step": step, "identity": SAVED}, current, stored, ends)

    def test_the_same_run(self):
        for stored in (BETWEEN, INT8, ("model.w",)):
            assert self.check(stored, refresh_steps=8) is None, "slices are taken at a fold, as L is the same"
        assert self.check(("model.w",), "training.steps", aggregate="sum", local_steps=1) is None, "nothing waits"

    @pytest.mark.parametrize(("key", "value"), OTHER)
    def test_steps_are_folded_as_they_were_trained(self, key: str, value: object):
        with pytest.raises(UserError) as caught:
            self.check(BETWEEN, **{key: value})
        assert str(caught.value) == (
            f"hdpissa.{key}: the checkpoint of step 6 lies between two folds of hdpissa.local_steps = 4: what waits is "
            f"for {SAVED[f'hdpissa.{key}']!r}, not {value!r}; set it back, or resume from a fold with "
            "checkpoint.load_step = 4"
        )

    @pytest.mark.parametrize(("step", "said"), [(3, "start anew with checkpoint.load_step = 0"), (9, "load_step = 8")])
    def test_a_run_without_a_step_to_fold_them(self, step: int, said: str):
        with pytest.raises(
            UserError, match=rf"^training\.steps: the checkpoint of step {step}, with .* raise it, or .*{said}$"
        ):
            self.check(BETWEEN, "training.steps", step)

    @pytest.mark.parametrize(("key", "value"), OTHER)
    def test_what_int8_has_left_is_for_one_factor(self, key: str, value: object):
        line = self.check(INT8, "training.steps", step=4, **{key: value})
        if key == "local_steps":
            assert line is None
        else:
            assert line == (
                f"hdpissa.{key}: changed; what int8 has left in dA and dB was for the old value, and is dropped"
            )

    def test_a_method_that_does_not_fold(self):
        assert check_unfolded({"step": 6, "identity": {}}, {"adapter.method": "lora"}, ("model.w",), "x") is None


def test_alpha_is_the_rank_where_it_is_not_set():
    """Writing the default out changes nothing."""
    default, explicit, full = JobConfig(), JobConfig(), JobConfig()
    explicit.adapter.alpha, full.adapter.method = 16, "full"
    first, second, third = (run_identity(c, None, 8, 16, "3 records", "") for c in (default, explicit, full))
    assert first == second
    assert not any(key.startswith("adapter.r") for key in third), "full has no rank that could differ"


def test_the_fingerprint_tells_models_of_the_same_shapes_apart(tmp_path: Path):
    assert weights_fingerprint("") == weights_fingerprint(str(tmp_path)) == ""
    (tmp_path / "model.safetensors").write_bytes(bytes(10**6))
    first = weights_fingerprint(str(tmp_path))
    assert weights_fingerprint(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(bytes(5 * 10**5) + b"\1" * (5 * 10**5))
    assert weights_fingerprint(str(tmp_path)) != first
