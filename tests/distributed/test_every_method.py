"""The table of methods, one after the other: what every method must say of itself and be able to do.

A new method is covered by its name in the table; a fact that it forgets fails here, not after somebody's training.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import runs
from tests.kit.commands import REPOSITORY
from titan_hd.adapters.adapter_linear import AdapterMethod
from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.adapters.method import Method
from titan_hd.adapters.methods import METHODS, build_method
from titan_hd.components.flops import trained_work
from titan_hd.config.manager import load
from titan_hd.export.model_card import model_card
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import parse_hf_config

# Another order of the same fp32 sums.
LOSS_TOLERANCE = 1e-5
EVERY = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def argv(tmp_path):
    """Options of a run of two steps of a method on a tiny model."""
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=20)

    def options(name: str, dump: str, **overrides):
        values = {"adapter__method": name, "training__global_batch_size": 8, "training__steps": 2} | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return options


@EVERY
def test_trains_resumes_and_exports(name: str, argv, workers, tmp_path: Path):
    """Two steps on two workers move W and nothing but what is targeted; a resume in the middle on one worker comes to
    the same weights."""
    losses = workers.run(2, runs.train, argv(name, "whole"))[0]
    whole, start = runs.exported(tmp_path / "whole"), load_file(tmp_path / "model" / "model.safetensors")
    moved = {key for key in start if not torch.equal(start[key], whole[key])}
    assert any(key.endswith("q_proj.weight") for key in moved)
    if METHODS[name].base != "trained":
        assert {key.split(".")[-2] for key in moved} == set(runs.LINEAR_LAYERS)
    saved = {"checkpoint__enable": "true", "hdpissa__num_adapters": 2 if METHODS[name].folds else 0}
    first = workers.run(2, runs.train, argv(name, "stopped", **saved), stop_after=1)[0]
    second = workers.run(1, runs.train, argv(name, "stopped", **saved))[0]
    assert first + second == pytest.approx(losses, rel=LOSS_TOLERANCE)
    for key, weight in runs.exported(tmp_path / "stopped").items():
        torch.testing.assert_close(weight, whole[key], rtol=1e-4, atol=1e-5)


@EVERY
def test_compiles(name: str, argv, workers):
    options = {"export__enable": "false", "activation_checkpoint__mode": "full"}
    eager = workers.run(1, runs.train, argv(name, "eager", **options))[0]
    traced = workers.run(1, runs.train_traced, argv(name, "compiled", **options, compile__enable="true"))[0]
    assert traced == pytest.approx(eager, rel=LOSS_TOLERANCE)


@EVERY
def test_exports_to_peft_or_says_why_not(name: str, argv, workers, tmp_path: Path):
    method, options = METHODS[name], argv(name, "peft", export__format="peft")
    reason = method.peft_error(load(options))
    assert bool(reason) == (method.peft_config.__func__ is Method.peft_config.__func__)
    if reason:
        assert reason.startswith(f"export.format: peft cannot hold method {name}: {method.no_peft}")
        return
    workers.run(2, runs.train, options)
    about = json.loads((tmp_path / "peft" / "hf" / "adapter_config.json").read_text())
    assert about["peft_type"]
    assert set(about["target_modules"]) == set(runs.LINEAR_LAYERS)
    assert load_file(tmp_path / "peft" / "hf" / "adapter_model.safetensors")


@EVERY
def test_operations_are_counted(name: str, argv):
    """Of every layer: a method without `flops` would end the run at its first log."""
    config = load(argv(name, "none"))
    with torch.device("meta"):
        model = Decoder(parse_hf_config(runs.ODD, "tests"))
        method = build_method(config)
        method.apply(model, None)
        for layer in model.modules():
            if isinstance(layer, FoldingLinear):  # as the adapter registry does
                layer.delta_A = torch.nn.Parameter(torch.empty(1, 1, layer.in_features))
                layer.delta_B = torch.nn.Parameter(torch.empty(1, layer.out_features, 1))
    weights, adapters = trained_work(model, 16)
    assert (weights > 0) != (adapters > 0)
    assert method.trained_parameters(model) > 0


@EVERY
def test_every_fact_is_given(name: str):
    method = METHODS[name]
    for fact in ("name", "title", "trains", "size", "base"):
        assert getattr(method, fact), fact
    assert method.paper or name == "full"
    if issubclass(method, AdapterMethod):
        layer = method.layer
        for answer in ("initial", "forward", "merged", "flops"):
            assert any(answer in vars(cls) for cls in layer.__mro__ if cls.__module__.startswith("titan_hd.adapters."))


@EVERY
def test_the_model_card_says_how(name: str):
    card = model_card({}, "", {"adapter": {"method": name}}, {})
    (line,) = (line for line in card.splitlines() if line.startswith("Method: "))
    assert METHODS[name].title in line
    assert METHODS[name].paper.removeprefix("arXiv ") in line
    assert line.endswith(f"{METHODS[name].how}.")


def rows() -> list[str]:
    """The table of docs/methods.md, as the methods' facts have it."""
    lines = []
    for method in METHODS.values():
        name = " or ".join(f"`{n}`" for n in (method.name, *method.aliases))
        split = "yes" if method.tensor_parallel() else "no"
        peft = "no" if method.no_peft else "yes"
        lines.append(f"| {name} | {method.trains} | {method.size} | {method.base} | {split} | {peft} |")
    return lines


def test_the_docs_have_the_table():
    table = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert [line for line in table.splitlines() if re.match(r"\| `", line)] == rows(), "\n".join(rows())


@EVERY
def test_the_docs_have_a_section_and_a_recipe(name: str):
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    assert re.search(rf"^## .*\b{name}\b", page, re.M)
    recipes = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "train_configs").glob("*.toml")]
    assert name == "hdpissa" or any(f'method = "{name}"' in recipe for recipe in recipes)
