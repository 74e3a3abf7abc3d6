"""The table of methods against the configuration: which keys each of them reads, and what it refuses."""

from __future__ import annotations

import typing

import pytest

from titan_hd.adapters.methods import METHODS, build_method, ignored_keys, method_errors, method_named
from titan_hd.config.job_config import Adapter, HDPissa, JobConfig
from titan_hd.config.manager import load

NEEDED = ["--data.train", "t", "--training.steps", "1", "--model.name", "llama3", "--model.flavor", "debugmodel"]
KEYS = {f"{section}.{key}" for section in ("adapter", "hdpissa") for key in vars(getattr(JobConfig(), section))}


def errors_of(*words: str) -> list[str]:
    return method_errors(load([*NEEDED, *words]))


def test_the_configuration_offers_the_table():
    offered = typing.get_args(typing.get_type_hints(Adapter)["method"])
    assert sorted(offered) == sorted(name for method in METHODS.values() for name in (method.name, *method.aliases))


def test_miss_is_bone():
    """What PEFT calls it now. A run that is resumed under the other name has the same identity."""
    assert method_named("miss") is method_named("bone")
    config = load([*NEEDED, "--adapter.method", "miss"])
    assert build_method(config).name == "bone"


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_facts_name_real_keys(method):
    assert set(method.keys) <= KEYS
    assert set(method.resume_keys) <= set(method.keys)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_in_a_sentence(method):
    sentence = build_method(load([*NEEDED, "--adapter.method", method.name])).sentence()
    assert sentence.startswith(f"{method.title} ({method.paper}): " if method.paper else f"{method.title}: ")
    assert sentence[-1].isalpha()
    assert len(sentence) < 180


def test_a_sentence_knows_the_variant():
    said = [
        build_method(load([*NEEDED, "--hdpissa.slices", slices])).sentence()
        for slices in typing.get_args(typing.get_type_hints(HDPissa)["slices"])
    ]
    assert len(set(said)) == len(said)
    assert "QR" in build_method(load([*NEEDED, "--adapter.method", "lora", "--adapter.init", "olora"])).sentence()


def test_every_key_is_read_by_some_method():
    read = {key for method in METHODS.values() for key in method.keys}
    assert read | {"adapter.method", "adapter.target_modules"} == KEYS


@pytest.mark.parametrize("method", ["hdpissa", "full", "dora"])
def test_a_variant_that_a_method_does_not_have(method: str):
    (line,) = errors_of("--adapter.method", method, "--adapter.init", "olora")
    assert line == f"adapter.init: is for lora, not for adapter.method {method}; leave it out"


@pytest.mark.parametrize("option", ["--adapter.rslora=true", "--adapter.loraplus_lr_ratio=16"])
def test_variants_of_lora(option: str):
    for method in ("lora", "pissa", "dora"):
        assert errors_of("--adapter.method", method, option) == []
    for method in ("hdpissa", "full"):
        (line,) = errors_of("--adapter.method", method, option)
        assert "is for lora, pissa, dora, not for" in line


def test_variants_of_mora_and_bat():
    assert errors_of("--adapter.method", "mora", "--adapter.mora_type", "1") == []
    assert errors_of("--adapter.method", "bat", "--adapter.bat_form", "row") == []
    (line,) = errors_of("--adapter.mora_type", "1")
    assert line == "adapter.mora_type: is for mora, not for adapter.method hdpissa; leave it out"


def test_what_peft_cannot_hold():
    model = ["--model.flavor=", "--model.hf_assets_path=model"]
    words = [*model, "--export.enable", "--export.format", "peft", "--adapter.method"]
    for method in ("lora", "pissa", "dora", "hira", "bone", "bat"):
        assert errors_of(*words, method) == []
    reasons = {"hdpissa": "not of low rank", "full": "it has no adapters", "mora": "the library does not have it"}
    for method, reason in reasons.items():
        (line,) = errors_of(*words, method)
        assert line.startswith(f"export.format: peft cannot hold method {method}: ")
        assert reason in line
    (line,) = errors_of(*words, "bat", "--adapter.bat_form", "row")
    assert line.startswith("export.format: peft has bat's column form alone")


@pytest.mark.parametrize("method", ["mora", "hira", "bone", "bat"])
def test_methods_without_alpha_say_so(method: str):
    (line,) = ignored_keys(load([*NEEDED, "--adapter.alpha", "4", "--adapter.method", method]))
    assert line == f"adapter.alpha: not used by adapter.method {method}"


def test_inherited_keys_without_a_meaning_are_named_once():
    words = ["--hdpissa.num_adapters", "8", "--adapter.svd_cache", "d", "--adapter.alpha", "4"]
    assert ignored_keys(load([*NEEDED, *words])) == []
    (line,) = ignored_keys(load([*NEEDED, *words, "--adapter.method", "lora"]))
    assert line == "adapter.svd_cache, hdpissa.num_adapters: not used by adapter.method lora"
    (line,) = ignored_keys(load([*NEEDED, *words, "--adapter.method", "full"]))
    assert line.startswith("adapter.alpha, adapter.svd_cache, hdpissa.num_adapters: ")
    assert ignored_keys(load([*NEEDED, "--adapter.method", "full", "--adapter.rank", "8"])) == []


def test_combinations_of_the_folding_family_that_make_no_sense():
    minor, unit = ["--hdpissa.slices", "minor"], ["--hdpissa.factor_scale", "unit"]
    assert errors_of(*minor, *unit) == errors_of(*minor, "--adapter.svd", "exact") == []
    (line,) = errors_of(*minor, "--adapter.svd", "randomized")
    assert line.startswith("adapter.svd: randomized finds the leading directions")
    together = ["--hdpissa.samples", "all"]
    assert errors_of(*together, *minor, *unit) == errors_of(*together, "--hdpissa.slices", "random") == []
    (line,) = errors_of(*together, "--hdpissa.mute_scalar", "1e-16")
    assert line.startswith("hdpissa.samples: all is for the exact mute")
    (line,) = errors_of(*together, "--hdpissa.slices", "top")
    assert line.startswith("hdpissa.slices: top slices that learn from all samples")
    (line,) = errors_of(*unit, "--hdpissa.slices", "random")
    assert line.startswith("hdpissa.factor_scale: unit is for singular directions")
    local = ["--hdpissa.local_steps", "4"]
    assert errors_of(*local, *minor, *unit) == errors_of(*local, "--hdpissa.refresh_steps", "8") == []
    assert errors_of(*local, "--hdpissa.exchange_dtype", "int8", "--adapter.dropout", "0.1") == []
    assert errors_of(*local, "--adapter.method", "lora") == []  # named among the keys that are not used
    (line,) = errors_of(*local, "--hdpissa.mute_scalar", "1e-16")
    assert line.startswith("hdpissa.local_steps: dA and dB of several steps stay in the forward pass")
    (line,) = errors_of(*local, *together)
    assert line.startswith("hdpissa.local_steps: with samples = all every worker would need everybody's dA and dB")
    (line,) = errors_of(*local, "--hdpissa.refresh_steps", "10")
    assert line.startswith(
        "hdpissa.refresh_steps: slices are taken from a W that is folded; use a multiple of hdpissa."
    )
    (line,) = errors_of(*local, "--optimizer.name", "ASGD")
    assert line.startswith("hdpissa.local_steps: dA and dB stay for several steps, in which ASGD would shrink them")
    int8 = ["--hdpissa.exchange_dtype", "int8"]
    assert errors_of(*int8, "--hdpissa.refresh_steps", "2") == []
    assert errors_of(*int8, *local, "--hdpissa.refresh_steps", "8") == []
    for period in (["--hdpissa.refresh_steps", "1"], [*local, "--hdpissa.refresh_steps", "4"]):
        assert errors_of(*period) == []
        (line,) = errors_of(*int8, *period)
        assert line.startswith("hdpissa.refresh_steps: new slices after every fold would drop all that int8 leaves")
    assert errors_of(*int8) == errors_of(*int8, "--hdpissa.exchange", "factors", "--optimizer.name", "SGD") == []
    for key, value in (("hdpissa.exchange", "dense"), ("hdpissa.mute_scalar", "1e-16"), ("optimizer.name", "ASGD")):
        (line,) = errors_of(*int8, f"--{key}", value)
        assert line.startswith("hdpissa.exchange")
        assert key in line


def test_patience_counts_folds():
    """Between two folds validation sees the same W, which would be no gain."""
    patient = ["--validation.enable", "--data.validation", "v", "--validation.patience", "2", "--validation.freq"]
    local = ["--hdpissa.local_steps", "4"]
    (line,) = errors_of(*local, *patient, "6")
    assert line == (
        "validation.patience: between two folds the validated W stays, which would count as no gain; use a "
        "validation.freq that is a multiple of hdpissa.local_steps = 4, or set it to 0"
    )
    assert errors_of(*local, *patient, "8") == errors_of(*patient, "6") == []
    assert errors_of(*local, *patient, "6", "--validation.patience", "0") == []
    assert errors_of(*local, *patient, "6", "--adapter.method", "lora") == []


def test_full_has_no_adapters_to_drop_out_or_leave_alone():
    full = ["--adapter.method", "full"]
    assert errors_of(*full) == []
    (line,) = errors_of(*full, "--adapter.dropout", "0.1")
    assert line == "adapter.dropout: method full has no adapters; set it to 0"
    (line,) = errors_of(*full, "--training.master_dtype", "bfloat16")
    assert line.startswith("training.master_dtype: bfloat16 is for methods that keep W frozen")
    delta = [*full, "--model.flavor=", "--model.hf_assets_path=model", "--checkpoint.base", "delta"]
    (line,) = errors_of(*delta)
    assert line.startswith("checkpoint.base: delta needs")
    assert errors_of(*delta, "--adapter.target_modules=q_proj") == []
