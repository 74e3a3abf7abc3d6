"""Both turns of MT-Bench, in the form that FastChat's judge reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.tokenizers import chat_directory
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from titan_hd.evaluation.mt_bench import Question, answer, read_questions

QUESTIONS = [Question(81, ["box", "jug"]), Question(82, ["the"]), Question(83, ["fox", "dog"])]


class Counting:
    """Answers with a number that goes up; keeps the texts it was asked."""

    def __init__(self, tokenizer):
        self._tokenizer, self.asked, self.stops = tokenizer, [], set()

    def generate(self, prompts, request):
        rows = []
        for prompt in prompts:
            rows.append(self._tokenizer.encode(f" {len(self.asked)}"))
            self.asked.append(prompt)
        self.stops |= set(request.stop_ids)
        assert (request.max_new_tokens, request.beams) == (9, 1)
        return rows


@pytest.fixture
def tokenizer(tmp_path: Path):
    return load_tokenizer(chat_directory(tmp_path / "model"))


def test_a_turn_sees_the_answer_before_it(tokenizer, tmp_path: Path):
    backend = Counting(tokenizer)
    progress = list(answer(tmp_path / "m.jsonl", QUESTIONS, "m", backend, tokenizer, 2, 9))
    assert [(p.done, p.total) for p in progress] == [(0, 3), (2, 3), (3, 3)]
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["choices"]) for row in rows] == [
        (81, [{"index": 0, "turns": ["0", "2"]}]),
        (82, [{"index": 0, "turns": ["1"]}]),
        (83, [{"index": 0, "turns": ["3", "4"]}]),
    ]
    assert set(rows[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}  # as FastChat writes them
    start, end = "<|im_start|>", "<|im_end|>\n"
    second = f"{start}user\nbox{end}{start}assistant\n0{end}{start}user\njug{end}{start}assistant\n"
    assert backend.asked[2] == tokenizer.encode(second, special=True)
    assert tokenizer.encode("<|im_end|>", special=True)[0] in backend.stops


def test_a_torn_file_goes_on_to_the_same(tokenizer, tmp_path: Path):
    path = tmp_path / "m.jsonl"
    list(answer(path, QUESTIONS, "m", Counting(tokenizer), tokenizer, 1, 9))
    content = path.read_bytes()
    first = content.splitlines(keepends=True)[0]
    path.write_bytes(first + b'{"question_id": 82')
    backend = Counting(tokenizer)
    backend.asked = [[], []]  # as many as the first question took
    list(answer(path, QUESTIONS, "m", backend, tokenizer, 1, 9))
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="is not of this evaluation"):
        list(answer(path, QUESTIONS, "another", Counting(tokenizer), tokenizer, 1, 9))


def test_questions_as_published(shared_data: Path):
    questions = read_questions(str(shared_data / "mt_bench" / "question.jsonl"))
    assert (len(questions), questions[0].id, {len(question.turns) for question in questions}) == (80, 81, {2})
    assert len(read_questions(str(shared_data / "mt_bench" / "question.jsonl"), 3)) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1}], r":1: mt_bench needs the columns question_id and turns; it has question_id"),
        ([{"question_id": 1, "turns": [7]}], r":1: turns: must be texts"),
        ([{"question_id": 1, "turns": ["a"]}] * 2, r":2: a question 1 was there before"),
    ],
)
def test_bad_questions(rows: list[dict], message: str, tmp_path: Path):
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        read_questions(str(path))
