"""MT-Bench's answers graded by a service of the test, as FastChat grades them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.kit.chat_service import Asked, Reply, fails, says, serve
from tests.kit.errors import message
from titan_hd.errors import UserError
from titan_hd.evaluation import judge, report
from titan_hd.evaluation.endpoint import Endpoint
from titan_hd.evaluation.mt_bench import Question, read_questions

PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": (
        "Q {question_1} R {ref_answer_1} Q {question_2} R {ref_answer_2} A {answer_1} A {answer_2}"
    ),
}
QUESTIONS = [
    Question(81, ["box {answer}", "jug"], "writing"),
    Question(111, ["1+1", "2+2"], "math"),
    Question(82, ["the"], "writing"),
]
ANSWERS = {81: ["a", "b"], 111: ["two", "four {question}"], 82: ["c"]}
REFERENCES = {111: ["2", "4"]}
TEXTS = {  # what the judge is to be asked, and the rating that it gives
    "Q box {answer} A a": 8,
    "Q box {answer} A a Q jug A b": 5,
    "Q 1+1 R 2 A two": 10,
    "Q 1+1 R 2 Q 2+2 R 4 A two A four {question}": 1,
    "Q the A c": 4,
}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def requests(tmp_path: Path) -> list[judge.Request]:
    prompts = judge.read_prompts(str(write_prompts(tmp_path / "judge_prompts.jsonl")))
    return judge.plan(QUESTIONS, ANSWERS, REFERENCES, prompts, "answers.jsonl")


def write_prompts(path: Path, **other: str) -> Path:
    rows = [{"name": "pair-v2", "type": "pairwise"}]
    for name, text in (PROMPTS | other).items():
        rows.append({"name": name, "type": "single", "system_prompt": f"system of {name}", "prompt_template": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def grade(asked: Asked) -> Reply:
    return says(f"Hm. Rating: [[{TEXTS[asked.body['messages'][1]['content']]}]]")


def run(path: Path, requests: list[judge.Request], url: str, at_once: int = 1, **options) -> list[tuple[int, int]]:
    endpoint = Endpoint(url, "org/judge", "sk-secret", pause=0.001, **options)
    return [(p.done, p.total) for p in judge.judge(path, requests, "m", endpoint, at_once)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("at_once", [1, 3])
def test_each_turn_is_graded(requests: list[judge.Request], tmp_path: Path, at_once: int):
    path = judge.judgment_file(tmp_path, "org/judge")
    assert path == tmp_path / "mt_bench" / "model_judgment" / "org_judge_single.jsonl"
    with serve(grade) as service:
        assert run(path, requests, service.url, at_once) == [(done, 5) for done in range(6)]
    bodies = [asked.body for asked in service.questions]
    assert sorted(body["messages"][1]["content"] for body in bodies) == sorted(TEXTS)
    systems = {body["messages"][1]["content"]: body["messages"][0] for body in bodies}
    assert systems["Q 1+1 R 2 A two"] == {"role": "system", "content": "system of single-math-v1"}
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in bodies} == {("org/judge", 0.0, 2048)}
    rows = read(path)
    assert [row.pop("tstamp") > 1e9 for row in rows] == [True] * 5
    assert rows[2] == {
        "question_id": 111, "model": "m", "judge": ["org/judge", "single-math-v1"], "user_prompt": "Q 1+1 R 2 A two",
        "judgment": "Hm. Rating: [[10]]", "score": 10, "turn": 1,
    }  # fmt: skip
    assert [(row["question_id"], row["turn"]) for row in rows] == [(81, 1), (81, 2), (111, 1), (111, 2), (82, 1)]
    summary = judge.summarise(path, requests, "m", "org/judge")
    assert (summary["score"], summary["turn_1"], summary["turn_2"]) == (28 / 5, 22 / 3, 3.0)
    assert summary["categories"]["writing"] == {"score": 17 / 3, "turn_1": 6.0, "turn_2": 5.0}
    # questions have 6.5, 5.5 and 4 in the mean: 16/3 -+ 1.96 * sqrt(1.5833 / 3)
    assert (summary["low"], summary["high"]) == (pytest.approx(3.9094, abs=1e-4), pytest.approx(6.7572, abs=1e-4))
    assert report.judged_table(summary)[1:3] == [
        "writing                  6.00    5.00  5.67",
        "math                    10.00    1.00  5.50",
    ]
    assert "sk-secret" not in path.read_text()


def test_what_was_judged_is_not_paid_again(requests: list[judge.Request], tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    with serve(grade) as service:
        run(path, requests, service.url)
    lines = path.read_text().splitlines(keepends=True)
    other = lines[0].replace('"model": "m"', '"model": "another"')
    path.write_text(other + lines[3] + lines[0] + lines[4][:20])
    with serve(grade) as service:
        assert run(path, requests, service.url)[0] == (2, 5)
        asked = [asked.body["messages"][1]["content"] for asked in service.questions]
        assert asked == ["Q box {answer} A a Q jug A b", "Q 1+1 R 2 A two", "Q the A c"]
        content = path.read_text()
        assert content.startswith(other + lines[0])
        assert [row["score"] for row in read(path)] == [8, 8, 5, 10, 1, 4]
        run(path, requests, service.url)
        assert (len(service.questions), path.read_text()) == (3, content)


def test_half_of_a_surrogate_pair_is_written_too(requests: list[judge.Request], tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    with serve(lambda asked: says("\ud83d Rating: [[7]]")) as service:
        run(path, requests, service.url)
        run(path, requests, service.url)
        assert len(service.questions) == len(requests)
    assert {row["judgment"] for row in read(path)} == {"\ud83d Rating: [[7]]"}


def test_a_failure_keeps_what_came(requests: list[judge.Request], tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    path.write_text('{"question_id": 81, "mod')  # torn by a kill before
    with serve(lambda asked: grade(asked) if asked.number < 2 else fails(500)) as service:
        with pytest.raises(UserError, match="did not answer in 2 attempts; at last: 500 no"):
            run(path, requests, service.url, attempts=2)
        assert len(service.questions) == 4
    assert [row["score"] for row in read(path)] == [8, 5]
    with serve(grade) as service:
        run(path, requests, service.url)
        assert len(service.questions) == 3
    assert len(read(path)) == 5


def test_what_is_under_way_at_a_failure_is_kept(requests: list[judge.Request], tmp_path: Path):
    """Three are asked at once; the first to be refused does not lose the others."""
    path, all_are_there = tmp_path / "judgments.jsonl", threading.Barrier(3)

    def answer(asked: Asked) -> Reply:
        all_are_there.wait(10)
        return fails(400) if "jug A b" in str(asked.body) else grade(asked)

    with serve(answer) as service:
        with pytest.raises(UserError, match="refuses: 400 no"):
            run(path, requests[:3], service.url, at_once=3)
        assert len(service.questions) == 3
    assert sorted(row["score"] for row in read(path)) == [8, 10]


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]]", 7.5),
        ("Between [[3]] and [[9]]", 3),
        ("See [2]. Rating: [[6]]", 6),
        ("Rating: [6]", 6),
        ("Rating: 6", -1),
        ("Rating: [[0]]", -1),
        ("Rating: [[100]]", -1),
        ("", -1),
    ],
)
def test_rating(judgment: str, score: float):
    assert judge.rating(judgment) == score


def test_judgments_without_a_rating_are_not_counted(requests: list[judge.Request], tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    with serve(lambda asked: says(None) if asked.number else grade(asked)) as service:
        run(path, requests, service.url)
    summary = judge.summarise(path, requests, "m", "org/judge")
    assert (summary["score"], summary["turn_2"], summary["no_rating"]) == (8.0, None, 4)
    assert report.judged_table(summary)[-1] == "mt_bench: 4 of 5 judgments hold no rating, and are not counted"


def test_judgments_of_other_answers_are_refused(requests: list[judge.Request], tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    with serve(grade) as service:
        run(path, requests, service.url)
    answers = ANSWERS | {81: ["a", "B"]}
    prompts = {request.prompt.name: request.prompt for request in requests}
    others = judge.plan(QUESTIONS, answers, REFERENCES, prompts, "answers.jsonl")
    with pytest.raises(UserError, match=r"judgments.jsonl:2: judges another answer to question 81, turn 2, than there"):
        run(path, others, "http://127.0.0.1:9/v1")
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"judgments.jsonl:1: is no judgment in FastChat's form"):
        run(path, others, "http://127.0.0.1:9/v1")


def test_references_as_published(shared_data: Path):
    source = str(shared_data / "mt_bench" / "reference_answer_gpt-4.jsonl")
    questions = read_questions(str(shared_data / "mt_bench" / "question.jsonl"))
    references, model = judge.read_answers(source)
    judge.check_references(questions, references, source)
    assert (model, len(references), {question.category for question in questions if question.id in references}) == (
        "gpt-4", 30, {"math", "reasoning", "coding"},
    )  # fmt: skip
    del references[111]
    assert message(judge.check_references, questions, references, "f") == (
        "f: has no answer to each turn of question 111 (math)"
    )


def test_bad_files(tmp_path: Path):
    path = write_prompts(tmp_path / "judge_prompts.jsonl", **{"single-math-v1": "Q {question} A {answer}"})
    assert ":3: prompt_template: single-math-v1 needs {ref_answer_1}" in message(judge.read_prompts, str(path))
    path.write_text('{"name": "single-v1"}\n')
    assert ":1: single-v1 needs the texts" in message(judge.read_prompts, str(path))
    path.write_text('{"name": "pair-v2"}\n')
    assert "has no prompt 'single-v1'; it must be FastChat's" in message(judge.read_prompts, str(path))
    row = {"question_id": 1, "model_id": "m", "choices": [{"turns": ["a"]}]}
    for rows, line in [
        ([row | {"choices": []}], ":1: needs question_id, model_id and choices with turns"),
        ([row, row], ":2: question 1 was answered before"),
        ([row, row | {"question_id": 2, "model_id": "n"}], ":2: has an answer of n, those before are of m"),
    ]:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
        assert line in message(judge.read_answers, str(path))
    assert message(judge.plan, QUESTIONS, {81: ["a"]}, {}, {}, "f") == "f: has 1 answers to question 81, not 2"
