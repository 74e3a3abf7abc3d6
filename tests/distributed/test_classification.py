"""A classifier under every method: its head is trained beside it, runs resume, transformers opens what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import runs
from tests.kit.classifiers import options, write_classifier, write_head, write_pairs
from titan_hd.adapters.methods import METHODS
from tools.convert_checkpoint import dcp_to_hf

LOSS_TOLERANCE = 1e-5  # another order of the same fp32 sums
HEAD = {"classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"}
LAYERS = {"query", "key", "value", "dense"}


@pytest.fixture
def argv(tmp_path: Path):
    """Options of a run of two steps on a tiny encoder."""
    write_classifier(tmp_path / "model")
    write_pairs(tmp_path / "train.tsv")

    def made(method: str, dump: str, **overrides):
        values = {"adapter__method": method, "training__global_batch_size": 8, "training__steps": 2} | overrides
        return options(tmp_path / "model", tmp_path / "train.tsv", tmp_path / dump, **values)

    return made


# What has a path of its own; the others share LoRA's, and are a minute's work.
QUICK = ("hdpissa", "full", "lora")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in METHODS])
def test_trains_resumes_and_exports(name: str, argv, workers, tmp_path: Path):
    """As of the decoder (test_every_method), and the new head moves too, from the same first values everywhere. New
    slices begin with an optimizer without memory; the head's goes on."""
    anew, stop = ({"hdpissa__refresh_steps": 2, "training__steps": 4}, 3) if name == "hdpissa" else ({}, 1)
    losses = workers.run(2, runs.train, argv(name, "whole", **anew))[0]
    whole, start = runs.exported(tmp_path / "whole"), load_file(tmp_path / "model" / "model.safetensors")
    assert whole.keys() == {*start, *HEAD} - {"lm_head.bias"}
    moved = {key for key in start.keys() & whole.keys() if not torch.equal(start[key], whole[key])}
    assert any(key.endswith("self.query.weight") for key in moved)
    if METHODS[name].base != "trained":
        assert {key.split(".")[-2] for key in moved} == LAYERS
    assert all(whole[key].any() for key in HEAD)  # biases start at zero
    saved = {"checkpoint__enable": "true", "hdpissa__num_adapters": 2 if METHODS[name].folds else 0, **anew}
    first = workers.run(2, runs.train, argv(name, "stopped", **saved), stop_after=stop)[0]
    second = workers.run(1, runs.train, argv(name, "stopped", **saved))[0]
    assert first + second == pytest.approx(losses, rel=LOSS_TOLERANCE)
    for key, weight in runs.exported(tmp_path / "stopped").items():
        torch.testing.assert_close(weight, whole[key], rtol=1e-4, atol=1e-5)


def test_the_head_learns_the_mean_of_all_adapters_losses(argv, workers, tmp_path: Path):
    """In a first step HD-PiSSA's model is LoRA's: its head, which two adapters share, moves as LoRA's does."""
    settings = {"training__steps": 1, "optimizer__name": "SGD", "optimizer__weight_decay": 0.1}
    heads = []
    for method in ("lora", "hdpissa"):
        workers.run(2, runs.train, argv(method, method, **settings))
        exported = runs.exported(tmp_path / method)
        heads.append({key: exported[key] for key in HEAD})
    for key in HEAD:
        torch.testing.assert_close(heads[1][key], heads[0][key], rtol=1e-5, atol=1e-7)


def test_adapters_that_learn_from_all_records_are_one_of_all_directions(argv, workers, tmp_path: Path):
    """... and the head is the same: K = 2 of rank 1 on two workers against K = 1 of rank 2 on one."""
    one = {"hdpissa__num_adapters": 1, "adapter__rank": 2}
    dealt = {"hdpissa__num_adapters": 2, "adapter__rank": 1, "hdpissa__samples": "all"}
    want = workers.run(1, runs.train, argv("hdpissa", "one", **one))[0]
    assert workers.run(2, runs.train, argv("hdpissa", "dealt", **dealt))[0] == pytest.approx(want, rel=LOSS_TOLERANCE)
    exported = runs.exported(tmp_path / "one")
    for key, weight in runs.exported(tmp_path / "dealt").items():
        torch.testing.assert_close(weight, exported[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"data__labels": "score"}, {"hdpissa__local_steps": 2}], ids=["score", "local"])
def test_two_workers_learn_what_one_does(changes: dict, argv, workers, tmp_path: Path):
    """A score, for which the files' head of two outputs gives way to a new one; and a head between two folds."""
    start = write_head(tmp_path / "model", "other", "same")
    text = (tmp_path / "train.tsv").read_text()
    if "data__labels" in changes:
        (tmp_path / "train.tsv").write_text(text.replace("\tsame", "\t4.75").replace("\tother", "\t-0.5"))
    settings = {"hdpissa__num_adapters": 2, "training__steps": 4, **changes}
    want = workers.run(1, runs.train, argv("hdpissa", "one", **settings))[0]
    assert workers.run(2, runs.train, argv("hdpissa", "two", **settings))[0] == pytest.approx(want, rel=LOSS_TOLERANCE)
    one, two = (runs.exported(tmp_path / name) for name in ("one", "two"))
    assert len(one["classifier.out_proj.bias"]) == (1 if "data__labels" in changes else 2)
    assert not any(torch.equal(one[key], start[key]) for key in HEAD)
    for key, weight in two.items():
        torch.testing.assert_close(weight, one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles(argv, workers):
    options = {"export__enable": "false"}
    eager = workers.run(1, runs.train, argv("bone", "eager", **options))[0]
    traced = workers.run(1, runs.train_traced, argv("bone", "compiled", **options, compile__enable="true"))[0]
    assert traced == pytest.approx(eager, rel=LOSS_TOLERANCE)


def test_dropout_of_the_model_does_not_depend_on_the_workers(argv, workers, tmp_path: Path):
    """... and recomputed blocks draw the same masks."""
    write_classifier(tmp_path / "model", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    settings = {"hdpissa__num_adapters": 2, "training__local_batch_size": 2, "export__enable": "false"}
    one, two, full = (
        workers.run(size, runs.train, argv("hdpissa", f"run{i}", **settings, activation_checkpoint__mode=mode))[0]
        for i, (size, mode) in enumerate(((1, "none"), (2, "selective"), (2, "full")))
    )
    assert two == pytest.approx(one, rel=LOSS_TOLERANCE)
    assert full == pytest.approx(one, rel=LOSS_TOLERANCE)


def test_a_stream_of_records_is_the_records(argv, workers):
    """Documents in a row, labels and cuts do not depend on how records come."""
    fixed = {"export__enable": "false", "data__shuffle": "false"}
    read = workers.run(2, runs.train, argv("lora", "read", **fixed))[0]
    assert workers.run(2, runs.train, argv("lora", "streamed", **fixed, data__streaming="true"))[0] == read


def test_validates_and_is_opened_by_transformers(argv, workers, tmp_path: Path):
    """The metrics of a run's last step are those of transformers' own model on the exported files."""
    metrics = pytest.importorskip("sklearn.metrics")
    transformers = pytest.importorskip("transformers")
    write_pairs(tmp_path / "dev.tsv", count=13, seed=1)
    settings = {"data__validation": tmp_path / "dev.tsv", "validation__enable": "true", "validation__freq": 2}
    settings |= {"training__steps": 6, "checkpoint__enable": "true", "checkpoint__keep_best": "validation_accuracy"}
    workers.run(2, runs.train, argv("bone", "run", **settings, data__format="classification"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validation_f1" in line][-1]
    folder = tmp_path / "run" / "hf"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model).__name__ == "RobertaForSequenceClassification"
    dcp_to_hf(tmp_path / "run" / "checkpoint" / "step-6", tmp_path / "converted", str(tmp_path / "model"), None, 1e9)
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    for key, weight in runs.exported(tmp_path / "run").items():
        torch.testing.assert_close(converted[key], weight, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["id2label"] == {"0": "other", "1": "same"}
    assert model.config.id2label == {0: "other", 1: "same"}
    tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path / "model")
    rows = [line.split("\t") for line in (tmp_path / "dev.tsv").read_text().splitlines()[1:]]
    inputs = tokenizer([row[1] for row in rows], [row[2] for row in rows], padding=True, return_tensors="pt")
    truth = torch.tensor([["other", "same"].index(row[3]) for row in rows])
    with torch.no_grad():
        logits = model(**inputs).logits
    chosen = logits.argmax(1)
    assert found["validation_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)
    assert found["validation_accuracy"] == pytest.approx(metrics.accuracy_score(truth, chosen))
    assert found["validation_f1"] == pytest.approx(metrics.f1_score(truth, chosen))
    assert found["validation_matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, chosen))


def answers(argv: list[str]) -> torch.Tensor:
    """Trains, and then the logits of the model as it was trained."""
    run = runs.trainer(argv)
    run.train()
    run.close()
    with torch.no_grad():
        return run.model.eval()(QUESTION).clone()


QUESTION = torch.tensor([[0, 6, 7, 8, 9, 2, 2, 6, 10, 2], [0, 9, 7, 2, 2, 6, 7, 8, 9, 2]])


def test_peft_puts_adapter_and_head_onto_the_encoder(argv, workers, tmp_path: Path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    settings = {"export__format": "peft", "adapter__target_modules": "query,dense", "adapter__rank": 2}
    ours = workers.run(2, answers, argv("lora", "run", **settings))[0]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2).eval()
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "hf").eval()
        theirs = model(QUESTION).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    about = json.loads((tmp_path / "run" / "hf" / "adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
