"""Answers are read off generated text as the evaluation protocols do, and counted once each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from titan_hd.components import validation
from titan_hd.components.validation import (
    Sharers,
    ValidationSet,
    Validator,
    check_references,
    exact_match,
    final_answer,
    own_answers,
    validation_sets,
)
from titan_hd.config.job_config import Checkpoint, JobConfig, Validation
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.tokens.statistics import Statistics
from titan_hd.errors import UserError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 4 + 3 = 7\nThe answer is: 7", "7"),
        ("The answer is: 7\n", "7"),
        ("The answer is: 7 \nand more", "7"),
        ("The answer is: 3. No: The answer is: 7", "7"),
        ("The answer is: ", ""),
        ("the answer is: 7", None),
        ("7", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None):
    """Text after the last marker, up to the end of its line."""
    assert final_answer(text, "The answer is: ") == answer


class Numbers:
    """Seven records, the last of which has no answer; prompt i is the id i, and so is its answer."""

    def __init__(self, name: str = "data.validation", answerable: bool = True):
        self.statistics, self.answerable = Statistics(name, "instruction"), answerable

    def __len__(self) -> int:
        return 7

    def prompt_ids(self, index: int) -> list[int]:
        return [index]

    def summary(self) -> str:
        return self.statistics.name

    def response(self, index: int) -> str:
        return "unknown" if index == 6 else f"the answer: {index}"


def share_right(samples: int, wrong: tuple[int, ...], batch_size: int) -> tuple[float, list[list[list[int]]]]:
    """Exact match where generation repeats the prompt, but for some; and what was asked of it on this worker."""
    asked: list[list[list[int]]] = []

    def answer(prompts: list[list[int]]) -> list[str]:
        asked.append(prompts)
        return [f"well, the answer: {-1 if prompt[0] in wrong else prompt[0]}" for prompt in prompts]

    sharers = Sharers(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, torch.device("cpu"))
    answers = own_answers(Numbers(), samples, answer, batch_size, sharers)
    return exact_match(Numbers(), samples, "the answer: ", answers, sharers), asked


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_exact_match(workers, world_size: int):
    """Records are shared out and scored once each; all workers generate equally often. A record without an answer in
    its reference cannot be right."""
    for samples, wrong, right in ((7, (), 6), (7, (0, 3), 4), (5, (4,), 4), (1, (), 1), (100, (), 6)):
        results = workers.run(world_size, share_right, samples, wrong, 2)
        assert {value for value, _ in results} == {right / min(samples, 7)}
        calls = [[len(batch) for batch in asked] for _, asked in results]
        assert calls == [calls[0]] * world_size


def shown_by(answers: int, shown: int) -> dict[str, list[dict]]:
    """What this worker has to show of all workers' answers, which repeat the records' numbers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tokenizer = SimpleNamespace(decode=lambda ids: f"prompt {ids[0]}")
    dims = SimpleNamespace(rank=rank, tp_rank=0)
    validator = Validator(comparing(answers), dims, torch.device("cpu"), [], lambda: tokenizer)
    own = {record: f"the answer: {record}" for record in range(rank, 7, size)}
    validator._show(ValidationSet(Numbers(), "/more", answers, shown), own)
    return validator.shown


def test_the_first_worker_alone_gets_what_is_shown(workers):
    """The texts of all go to who writes them, in the order of the records."""
    first, second = workers.run(2, shown_by, 2, 3)
    assert [tuple(row.values()) for row in first["samples/more"]] == [
        (i, f"prompt {i}", f"the answer: {i}", f"the answer: {i}", True if i < 2 else None) for i in range(3)
    ]
    assert second == {}


def test_an_answer_keeps_its_first_space(monkeypatch):
    """Decoded by itself it would lose it with this tokenizer, which is of SentencePiece's kind."""
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "assets" / "quickstart" / "model")
    monkeypatch.setattr(validation, "generate", lambda *args, **options: [tokenizer.continuation("  x = 1")])
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=None))
    dims = SimpleNamespace(rank=0, tp_rank=0, tp=1)
    validator = Validator(comparing(1), dims, torch.device("cpu"), [], lambda: tokenizer)
    assert validator._answer(None, frozenset(), [tokenizer.encode("if x:")]) == ["  x = 1"]


def test_references_without_the_marker(caplog):
    check_references(Numbers(), 6, "the answer: ")
    assert not caplog.text
    check_references(Numbers(), 100, "the answer: ")
    assert "1 of the 7 responses to compare with lack 'the answer: '; no answer to them is right" in caplog.text
    with pytest.raises(UserError) as caught:
        check_references(Numbers(), 3, "The answer is: ")
    assert str(caught.value) == (
        "validation.answer_marker: none of the 3 responses to compare with holds 'The answer is: '; the first is "
        "'the answer: 0'"
    )


def comparing(samples: int, marker: str = "the answer: ", **checkpoint) -> JobConfig:
    settings = Validation(exact_match_samples=samples, answer_marker=marker)
    return JobConfig(validation=settings, checkpoint=Checkpoint(**checkpoint))


class TestNamedSets:
    def test_the_first_is_the_main_one(self):
        """Its metrics have no name; one without records to compare with has a loss alone."""
        config = comparing(5)
        datasets = {"math": Numbers("data.validation[math]"), "more": Numbers("data.validation[more]")}
        sets = validation_sets({**datasets, "plain": Numbers("data.validation[plain]", answerable=False)}, config)
        assert [(one.suffix, one.answers) for one in sets] == [("", 5), ("/more", 5), ("/plain", 0)]
        config.validation.exact_match_samples = 0
        assert [one.answers for one in validation_sets(datasets, config)] == [0, 0]

    def test_why_another_set_has_no_exact_match(self, caplog):
        caplog.set_level("INFO", "titan_hd")
        config = comparing(7)
        validation_sets({"math": Numbers(), "plain": Numbers("data.validation[plain]", answerable=False)}, config)
        assert caplog.messages[-1] == (
            "data.validation[plain]: its loss is measured, but no exact match (validation.exact_match_samples: needs "
            "records with a prompt and a response)"
        )
        validation_sets({"math": Numbers(), "more": Numbers("data.validation[more]")}, config)
        assert "1 of the 7 responses of data.validation[more] to compare with lack" in caplog.messages[-1]

    @pytest.mark.parametrize("samples", [-1, 0, 2])
    def test_samples_that_a_set_cannot_have(self, samples: int, caplog):
        """Said once, where they were asked for."""
        config = comparing(5)
        config.validation.samples = samples
        plain = Numbers("data.validation[plain]", answerable=False)
        sets = validation_sets({"math": Numbers(), "plain": plain}, config)
        assert [one.shown for one in sets] == [{-1: 4, 0: 0, 2: 2}[samples], 0]
        line = "validation.samples: data.validation[plain] has no prompts and responses; none of it is answered"
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [line] * (
            samples > 0
        )

    def test_the_main_set_must_be_comparable(self):
        config = comparing(7, "The answer is: ")
        with pytest.raises(UserError, match=r"validation\.answer_marker: none of the 7 responses to compare with"):
            validation_sets({"math": Numbers(), "more": Numbers()}, config)

    def test_the_best_is_not_by_what_cannot_be_measured(self):
        config = comparing(7, keep_best="validation_exact_match/plain")
        with pytest.raises(UserError) as caught:
            validation_sets({"math": Numbers(), "plain": Numbers(answerable=False)}, config)
        assert str(caught.value) == (
            "checkpoint.keep_best: validation_exact_match/plain cannot be measured: validation.exact_match_samples: "
            "needs records with a prompt and a response"
        )

    def test_what_the_metrics_are_measured_on(self):
        """Values compare where the text is the same: the same records, as many of them, answered in the same way."""

        def measured_on(name: str = "a", workers: int = 2, **settings) -> dict[str, str]:
            config = comparing(5)
            config.validation = dataclasses.replace(config.validation, **settings)
            sets = validation_sets({"m": Numbers(name), "plain": Numbers(answerable=False)}, config)
            dims = SimpleNamespace(dp_size=workers)
            return Validator(config, dims, torch.device("cpu"), sets, None).measured_on()

        usual = measured_on()
        assert usual.keys() == {"validation_loss", "validation_exact_match", "validation_loss/plain"}
        assert usual["validation_loss"] == "7 of a"
        assert measured_on(workers=3, batch_size=4, freq=9) == usual
        assert measured_on(steps=2, batch_size=1)["validation_loss"] == "4 of a"
        assert measured_on(steps=2, batch_size=1, workers=4) == usual
        for change in ({"exact_match_samples": 6}, {"max_new_tokens": 7}, {"name": "b"}):
            assert measured_on(**change)["validation_exact_match"] != usual["validation_exact_match"]

    @pytest.mark.parametrize(
        ("workers", "settings", "batches"),
        [
            (2, {"batch_size": 2}, 2 + 2 + 2),  # of 7 records in two sets, and 3 of 5 answers on each worker
            (1, {"batch_size": 4}, 2 + 2 + 2),
            (2, {"batch_size": 2, "steps": 1}, 1 + 1 + 2),
            (1, {"batch_size": 1}, 7 + 7 + 5),
            (8, {"batch_size": 4}, 1 + 1 + 1),
        ],
    )
    def test_how_much_a_worker_goes_through(self, workers: int, settings: dict[str, int], batches: int):
        config = comparing(5)
        config.validation = dataclasses.replace(config.validation, **settings)
        sets = validation_sets({"m": Numbers(), "plain": Numbers(answerable=False)}, config)
        dims = SimpleNamespace(dp_size=workers)
        assert Validator(config, dims, torch.device("cpu"), sets, None).batches() == batches
