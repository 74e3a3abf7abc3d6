"""Answers as they come, stop texts, and an evaluation that is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kit.decoders import VARIANTS, random_decoder
from titan_hd.components.generation import generate
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from titan_hd.evaluation.answering import agree_on_settings, answer
from titan_hd.evaluation.backends import NativeBackend, Request
from titan_hd.evaluation.prompts import Prompt, batches, fingerprint
from titan_hd.evaluation.task import Problem
from titan_hd.evaluation.tasks import TASKS


class Letters:
    """A token is a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Echo:
    """Answers with the prompt; counts what it is asked, and is killed in the batch `killed_at`."""

    def __init__(self, killed_at: int = -1):
        self.asked: list[list[str]] = []
        self._killed_at = killed_at

    def generate(self, prompts, request):
        if len(self.asked) == self._killed_at:
            raise KeyboardInterrupt
        self.asked.append(["".join(map(chr, prompt)) for prompt in prompts])
        return [prompt[: request.max_new_tokens] for prompt in prompts]


def prompts(task: str = "gsm8k", count: int = 7) -> list[Prompt]:
    texts = [f"{'x' * (i % 3)}The answer is: {i}" for i in range(count)]
    return [Prompt(TASKS[task], Problem(str(i), "", "3"), text, list(map(ord, text))) for i, text in enumerate(texts)]


PLAN = [*batches(prompts(), 2), *batches(prompts("boolq", 3), 2)]


def run(folder: Path, backend: Echo, **options) -> list:
    folder.mkdir(exist_ok=True)
    return list(answer(folder, PLAN, backend, Letters(), **options))


def test_batches_have_like_lengths_longest_first():
    ids = [[prompt.problem.id for prompt in batch] for batch in batches(prompts(), 3)]
    assert ids == [["2", "5", "1"], ["4", "0", "3"], ["6"]]


def test_samples_come_with_each_batch(tmp_path: Path):
    progress = run(tmp_path, Echo())
    assert [(p.task, p.done, p.total) for p in progress] == [
        *(("gsm8k", 0, 7), ("gsm8k", 2, 7), ("gsm8k", 4, 7), ("gsm8k", 6, 7), ("gsm8k", 7, 7)),
        *(("boolq", 0, 3), ("boolq", 2, 3), ("boolq", 3, 3)),
    ]
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows if row["right"]] == ["3"]
    assert rows[0] == {
        "task": "gsm8k", "id": "2", "prompt": "xxThe answer is: 2", "output": "xxThe answer is: 2", "extracted": "2",
        "reference": "3", "right": False,
    }  # fmt: skip


def test_a_continuation_keeps_its_indentation(tmp_path: Path):
    """Decoded by itself it would lose a space with this tokenizer, which is of SentencePiece's kind."""
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "assets" / "quickstart" / "model")
    text = "    return 1\n"
    assert tokenizer.decode(tokenizer.continuation(text)) == text[1:]
    question = "def f():\n"
    prompt = Prompt(TASKS["gsm8k"], Problem("0", "", "3"), question, tokenizer.encode(question))
    backend = SimpleNamespace(generate=lambda prompts, request: [tokenizer.continuation(text)])
    list(answer(tmp_path, [[prompt]], backend, tokenizer))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["output"] == text


@pytest.mark.parametrize("killed_at", [0, 1, 4])
@pytest.mark.parametrize("torn", [b"", b'{"task": "gsm8k", "id', "whole"])
def test_a_killed_evaluation_goes_on_to_the_same_file(killed_at: int, torn: bytes | str, tmp_path: Path):
    """What a kill may leave behind the whole batches: nothing, a piece of a line, or one whole line of a batch."""
    run(tmp_path / "undisturbed", Echo())
    expected = (tmp_path / "undisturbed" / "samples.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Echo(killed_at))
    path = tmp_path / "killed" / "samples.jsonl"
    done = path.read_bytes()
    assert expected.startswith(done)
    assert done.count(b"\n") == sum(map(len, PLAN[:killed_at]))
    whole = expected.splitlines(keepends=True)[done.count(b"\n")]
    path.write_bytes(done + (whole if isinstance(torn, str) else torn))
    backend = Echo()
    run(tmp_path / "killed", backend)
    assert path.read_bytes() == expected
    assert backend.asked == [[prompt.text for prompt in batch] for batch in PLAN[killed_at:]]
    # and once more, with nothing left to ask
    progress = run(tmp_path / "killed", again := Echo())
    assert (again.asked, path.read_bytes()) == ([], expected)
    assert (progress[-1].done, progress[-1].total, progress[-1].tokens) == (3, 3, 0)


def test_samples_from_elsewhere_are_refused(tmp_path: Path):
    run(tmp_path, Echo())
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text().replace('"id": "5"', '"id": "77"'))
    with pytest.raises(UserError, match=r"samples.jsonl: the line that ends at byte \d+ is not of this evaluation"):
        run(tmp_path, Echo())


def test_other_settings_are_refused(tmp_path: Path):
    agree_on_settings(tmp_path / "out", {"limit": 5, "stop": ("a",)})
    agree_on_settings(tmp_path / "out", {"limit": 5, "stop": ("a",)})
    with pytest.raises(UserError, match=r"--output: .* has an evaluation with another limit \(5, not 6\)"):
        agree_on_settings(tmp_path / "out", {"limit": 6})
    agree_on_settings(tmp_path / "tasks", {"tasks": {"gsm8k": "a", "boolq": "b"}})
    with pytest.raises(UserError, match=r"with other tasks \(gsm8k, boolq, not gsm8k\); name another directory"):
        agree_on_settings(tmp_path / "tasks", {"tasks": {"gsm8k": "a"}})
    with pytest.raises(UserError, match=r"with other problems or prompts of boolq; name another directory"):
        agree_on_settings(tmp_path / "tasks", {"tasks": {"gsm8k": "a", "boolq": "c"}})
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(UserError, match=r"has a samples.jsonl that was not generated here"):
        agree_on_settings(tmp_path, {})


def test_prompts_and_references_have_a_fingerprint():
    first, *others = prompts()
    assert fingerprint([first, *others]) == fingerprint(prompts())
    assert fingerprint(prompts(count=6)) != fingerprint(prompts())


def test_a_limit_and_a_stop_text_end_an_answer(tmp_path: Path):
    run(tmp_path / "limit", Echo(), max_new_tokens=3)
    run(tmp_path / "stop", Echo(), stop=[" is", "zz"])
    for name, output in (("limit", "xxT"), ("stop", "xxThe answer")):
        row = json.loads((tmp_path / name / "samples.jsonl").read_text().splitlines()[0])
        assert row["output"] == output


def test_the_decoder_stops_when_every_row_has_its_text(monkeypatch):
    model = random_decoder(VARIANTS["grouped-query"][0], seed=3)
    asked = [[5, 17, 3], [9, 8, 7, 6, 5], [33]]
    free = generate(model, asked, (), 24, torch.device("cpu"))
    ends = {row[index] for row, index in zip(free, (3, 5, 7))}
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    backend = NativeBackend(model, torch.device("cpu"))
    rows = backend.generate(asked, Request((), 24, ended=lambda row: row[-1] in ends))
    expected = [row[: next(i for i, token in enumerate(row) if token in ends) + 1] for row in free]
    assert rows == expected
    assert len(passes) == max(map(len, expected)) < 24
