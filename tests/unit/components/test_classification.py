"""Metrics of classifiers, by hand; what a classifier's run refuses, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.kit import runs
from tests.kit.classifiers import options, write_classifier, write_head, write_pairs
from titan_hd.components import classification
from titan_hd.components.classification import measure, metric_names
from titan_hd.config.manager import ConfigError, load
from titan_hd.data import build
from titan_hd.models.classification import label_of_score
from titan_hd.preflight import plan_run


def test_metrics_of_two_classes():
    """3 true and 1 false of class 1, 2 true and 1 missed: accuracy 5/7, F1 of class 1 is 6 / (6 + 1 + 1)."""
    pytest.importorskip("sklearn")
    truth, chosen = torch.tensor([1, 1, 1, 0, 0, 0, 1]), torch.tensor([1, 1, 1, 1, 0, 0, 0])
    logits = torch.nn.functional.one_hot(chosen).float() * 2
    found = measure(logits, truth)
    assert list(found) == ["loss", *metric_names(2)]
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["f1"] == pytest.approx(6 / 8)
    assert found["matthews"] == pytest.approx((3 * 2 - 1 * 1) / (4 * 4 * 3 * 3) ** 0.5)
    right, wrong = (torch.log(1 + torch.exp(torch.tensor(x))).item() for x in (-2.0, 2.0))
    assert found["loss"] == pytest.approx((5 * right + 2 * wrong) / 7)
    assert measure(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 1, 1]))["matthews"] == 0.0


def test_f1_of_three_classes_is_their_mean():
    pytest.importorskip("sklearn")
    found = measure(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]))
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_correlations_of_scores():
    pytest.importorskip("scipy")
    truth = [1.0, 2.0, 3.0, 10.0]
    labels = torch.tensor([label_of_score(score) for score in truth])
    found = measure(torch.tensor([[1.0], [2.0], [4.0], [3.0]]), labels)
    assert list(found) == ["loss", *metric_names(1)]
    assert found["spearman"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert found["pearson"] == pytest.approx(7 / (50 * 5) ** 0.5)
    assert found["loss"] == pytest.approx((1 + 49) / 4)
    assert measure(torch.ones(4, 1), labels)["pearson"] == 0.0


@pytest.fixture
def argv(tmp_path: Path):
    write_classifier(tmp_path / "model")
    write_pairs(tmp_path / "train.tsv", count=2)
    return lambda **changes: options(tmp_path / "model", tmp_path / "train.tsv", tmp_path / "out", **changes)


def test_a_plan_says_what_the_model_reads(argv):
    plan = plan_run(load(argv()), 2)
    assert (plan.config.data.format, plan.config.data.labels) == ("classification", ["other", "same"])
    assert plan.decoder.num_labels == 2
    assert plan_run(load(argv(data__labels="score")), 1).decoder.num_labels == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data__format": "text"}, "data.format: text is for models that write text; roberta"),
        ({"parallelism__tensor_parallel_degree": 2}, "parallelism.tensor_parallel_degree: roberta models have no"),
        ({"training__seq_len": 33}, "training.seq_len: 33 is more than the positions that the model has, 32"),
        ({"validation__exact_match_samples": 3}, "validation.exact_match_samples: a classifier writes no answers"),
        ({"validation__samples": 2}, "validation.samples: a classifier writes no answers"),
        ({"training__enable_cpu_offload": "true"}, "training.enable_cpu_offload: method hdpissa cannot train"),
        ({"adapter__target_modules": "classifier.dense"}, "adapter.target_modules: 'classifier.dense' is no linear"),
    ],
)
def test_refusals(argv, changes: dict, reason: str):
    with pytest.raises(ConfigError) as caught:
        plan_run(load(argv(**{"adapter__method": "hdpissa" if "offload" in reason else "lora"} | changes)), 2)
    assert any(line.startswith(reason) for line in str(caught.value).splitlines()), caught.value


MNLI = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
TRAINED = r"data.labels: the classification head in \S+model was trained for CONTRADICTION, NEUTRAL, ENTAILMENT"


@pytest.mark.parametrize(
    ("names", "labels", "warning"),
    [
        (MNLI, "contradiction,neutral,entailment", ""),
        (MNLI, "", ""),
        (MNLI, "no,maybe,yes", TRAINED + ", not for no, maybe, yes: training begins"),
        (MNLI, "entailment,not_entailment", TRAINED + r": a new one is drawn for the 2 label\(s\)"),
        (MNLI, "score", TRAINED + r": a new one is drawn for the 1 label\(s\)"),
        (("LABEL_0", "LABEL_1"), "b,a", ""),
        ((), "b,a", ""),
        ((), "score", "data.labels: the classification head in .* trained for 0, 1: a new one is drawn"),
    ],
)
def test_a_trained_head_under_other_labels(argv, tmp_path: Path, names, labels: str, warning: str):
    write_head(tmp_path / "model", *names)
    found = [line for line in plan_run(load(argv(data__labels=labels)), 1).warnings if "head" in line]
    assert len(found) == bool(warning)
    assert re.match(warning, "".join(found)), found


def test_a_trained_head_under_its_labels_in_another_order(argv, tmp_path: Path):
    labels = {"data__labels": "entailment,neutral,contradiction"}
    plan_run(load(argv(**labels)), 1)  # a new head
    write_head(tmp_path / "model", *MNLI)
    with pytest.raises(ConfigError, match=TRAINED + "; name them in this order: contradiction, neutral, entailment$"):
        plan_run(load(argv(**labels)), 1)


def test_best_by_a_metric_of_another_kind(argv, tmp_path: Path):
    settings = {"data__validation": tmp_path / "train.tsv", "validation__enable": "true", "checkpoint__enable": "true"}
    settings |= {"data__format": "classification", "checkpoint__keep_best": "validation_pearson"}
    with pytest.raises(ConfigError, match=r"checkpoint.keep_best: must be validation_loss or validation_accuracy or"):
        plan_run(load(argv(**settings)), 1)


def test_a_package_that_is_not_there(argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classification.importlib.util, "find_spec", lambda name: None)
    settings = {"data__validation": tmp_path / "train.tsv", "validation__enable": "true"}
    with pytest.raises(
        ConfigError, match=r"validation.enable: the metrics need scikit-learn: pip install scikit-learn"
    ):
        plan_run(load(argv(**settings)), 1)
    plan_run(load(argv(**settings)), 1, needs_files=False)


@pytest.mark.parametrize("entry", [{}, {"format": "auto"}])
def test_every_entry_of_a_list_is_read_as_a_classifier_reads(argv, tmp_path: Path, entry: dict):
    sources = json.dumps([{"path": str(tmp_path / "train.tsv"), **entry}])
    settings = {"data__train": sources, "data__validation": sources, "validation__enable": "true"}
    data = plan_run(load(argv(**settings)), 1, needs_files=False).config.data
    assert [source.config.format for key in ("train", "validation") for source in build.sources(data, key)] == [
        "classification",
        "classification",
    ]


def test_best_by_a_classifiers_metric(argv, tmp_path: Path):
    settings = {"data__validation": tmp_path / "train.tsv", "validation__enable": "true", "checkpoint__enable": "true"}
    settings["checkpoint__keep_best"] = "validation_accuracy"
    plan_run(load(argv(**settings)), 1, needs_files=False)
    runs.write_model(tmp_path / "decoder")
    with pytest.raises(ConfigError, match=r"checkpoint.keep_best: validation_accuracy is for a model with a class"):
        plan_run(load(argv(**settings, model__hf_assets_path=tmp_path / "decoder")), 1)


@pytest.mark.parametrize(("key", "value"), [("data__format", "classification"), ("data__labels", "a,b")])
def test_a_model_that_writes_classifies_nothing(tmp_path: Path, key: str, value: str):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=2)
    argv = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "out", **{key: value})
    with pytest.raises(ConfigError, match=rf"{key.replace('__', '.')}: is for a model with a classification head"):
        plan_run(load(argv), 1)
