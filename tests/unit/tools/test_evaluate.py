"""tools/evaluate.py: a model asked, outputs of any system scored, compared with others', and bad input."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

from tests.kit.chat_service import says, serve
from tests.kit.commands import call_tool, error_lines
from tools import evaluate

ANSWERS = ["18", "3", "70,000", "-5"]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def outputs(answers: list[str], task: str = "gsm8k") -> list[dict]:
    return [{"task": task, "id": i, "output": f"The answer is: {text}"} for i, text in enumerate(answers)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four problems of GSM8K and two of BoolQ."""
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "boolq").mkdir()
    rows = [{"question": f"Question {i}?", "answer": f"Steps\n#### {text}"} for i, text in enumerate(ANSWERS)]
    write_lines(tmp_path / "data" / "gsm8k" / "test.jsonl", rows)
    rows = [{"instruction": "q", "input": "", "output": "", "answer": text} for text in ("true", "false")]
    (tmp_path / "data" / "boolq" / "test.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_predictions_are_scored(data: Path, tmp_path: Path):
    rows = [*outputs(["18", "4", "70000", "-5"]), *outputs(["true", "dunno"], "boolq")]
    predictions = write_lines(tmp_path / "outputs.jsonl", rows)
    result = call_tool(evaluate.main, "--predictions", predictions, "--data", data, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "gsm8k: 100%" in result.stderr
    assert "boolq: 100%" in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]
    assert summary["gsm8k"] == {
        "n": 4, "right": 3, "accuracy": 0.75, "low": pytest.approx(0.3006, abs=1e-4),
        "high": pytest.approx(0.9544, abs=1e-4), "no_answer": 0,
    }  # fmt: skip
    assert (summary["boolq"]["right"], summary["boolq"]["no_answer"]) == (1, 1)
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["gsm8k", "4", "3", "75.00", "30.06", "-", "95.44", "0"]
    assert lines[3].split() == ["mean", "of", "tasks", "62.50"]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert samples[1] == {
        "task": "gsm8k", "id": "1", "prompt": "", "output": "The answer is: 4", "extracted": "4", "reference": "3",
        "right": False,
    }  # fmt: skip
    # The samples are predictions too, and give themselves again.
    again = call_tool(evaluate.main, "--predictions", tmp_path / "out", "--data", data, "--output", tmp_path / "again")
    assert again.stdout == result.stdout
    for name in ("samples.jsonl", "summary.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_home_in_every_path(data: Path, tmp_path: Path, monkeypatch):
    """Of options as --data=~/x the shell does not expand it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "outputs.jsonl", outputs(["18", "4", "70000", "-5"]))
    (tmp_path / "elsewhere.jsonl").write_text((data / "gsm8k" / "test.jsonl").read_text())
    for place in ("--data=~/data", "--source=gsm8k=~/elsewhere.jsonl"):
        result = call_tool(evaluate.main, "--predictions=~/outputs.jsonl", place, "--output=~/out")
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["gsm8k"]["right"] == 3
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "q", "response": "The answer is: 18"}])
    write_lines(tmp_path / "answers.jsonl", [{"task": "own", "id": 0, "output": "The answer is: 18"}])
    options = [f"--records=~/{own.name}", "--marker=The answer is: ", "--output=~/other"]
    result = call_tool(evaluate.main, "--predictions=~/answers.jsonl", *options)
    assert result.returncode == 0, result.stderr


def test_data_sets_of_the_hub(data: Path, tmp_path: Path, monkeypatch):
    """By a stand-in for the package `datasets`: the name, the config and the split that are asked for, and its rows."""
    calls, rows = [], [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        calls.append((name, config, split))
        if name != "openai/gsm8k":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    write_lines(tmp_path / "outputs.jsonl", outputs(["18", "4", "70000", "-5"]))
    fixed = ["--predictions", tmp_path / "outputs.jsonl", "--output", tmp_path / "out"]
    result = call_tool(evaluate.main, *fixed, "--source", "gsm8k=openai/gsm8k:main:test")
    assert result.stdout.splitlines()[1].split()[:3] == ["gsm8k", "4", "3"], result.stderr
    (line,) = error_lines(call_tool(evaluate.main, *fixed, "--source", "gsm8k=openai/gsm9k:test"))
    assert (
        line == "titan_hd: error: gsm8k: cannot read openai/gsm9k:test: Dataset 'openai/gsm9k' doesn't exist on the Hub"
    )
    assert calls == [("openai/gsm8k", "main", "test"), ("openai/gsm9k", None, "test")]
    rows[1] = {"problem": "q"}
    (line,) = error_lines(call_tool(evaluate.main, *fixed, "--source", "gsm8k=openai/gsm8k:main:test"))
    assert "openai/gsm8k:main:test: row 2: gsm8k needs the columns question and answer" in line
    monkeypatch.setitem(sys.modules, "datasets", None)
    (line,) = error_lines(call_tool(evaluate.main, *fixed, "--source", "gsm8k=openai/gsm8k:main:test"))
    assert "as a data set of the Hub it needs the package datasets: pip install datasets, or titan_hd[hub]" in line


def test_two_systems_are_compared(data: Path, tmp_path: Path):
    for name, answers in (("ours", ["18", "3", "70000", "0"]), ("theirs", ["18", "0", "0", "-5"])):
        predictions = write_lines(tmp_path / f"{name}.jsonl", outputs(answers))
        arguments = ["--predictions", predictions, "--data", data, "--output", tmp_path / name]
        result = call_tool(evaluate.main, *arguments, *(["--against", tmp_path / "ours"] if name == "theirs" else []))
        assert result.returncode == 0, result.stderr
    assert "gsm8k: against the other samples -25.00 points, 95% interval" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("on 4 problems; 1 gained, 2 lost")
    against = json.loads((tmp_path / "theirs" / "summary.json").read_text())["tasks"]["gsm8k"]["against"]
    assert (against["n"], against["difference"], against["gained"], against["lost"]) == (4, -0.25, 1, 2)


def test_halves_of_surrogate_pairs_stay_as_they_came(data: Path, tmp_path: Path):
    predictions = write_lines(tmp_path / "outputs.jsonl", outputs(["18 \ud83d", "3 \U0001f600"]))
    result = call_tool(evaluate.main, "--predictions", predictions, "--data", data, "--output", tmp_path / "out")
    assert result.stdout.splitlines()[1].split()[:3] == ["gsm8k", "2", "2"], result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [row["output"] for row in rows] == ["The answer is: 18 \ud83d", "The answer is: 3 \U0001f600"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"task": "boolq", "id": "0", "output": "", "right": True}, "has no sample of a problem of gsm8k that is"),
        ({"task": "gsm8k", "id": "9", "output": "", "right": True}, "has no sample of a problem of gsm8k that is"),
        ({"task": "gsm8k", "id": "0", "output": ""}, 'others.jsonl:1: has no "right": score the file first'),
        (
            {"task": "gsm8k", "id": "0", "output": "", "right": True, "reference": "19"},
            "others.jsonl:1: gsm8k 0 is another problem there: its reference is '19', not '18'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anybody_is_asked(
    other: dict, message: str, data: Path, tmp_path: Path
):
    others = write_lines(tmp_path / "others.jsonl", [other])
    fixed = ["--tasks", "gsm8k", "--data", data, "--output", tmp_path / "out", "--against", others]
    (line,) = error_lines(call_tool(evaluate.main, tmp_path / "no model is read", *fixed))
    assert message in line


def test_what_has_no_output_is_said_and_not_counted(data: Path, tmp_path: Path):
    predictions = write_lines(tmp_path / "outputs.jsonl", outputs(["18"]))
    result = call_tool(evaluate.main, "--predictions", predictions, "--data", data, "--output", tmp_path / "out")
    assert "warning: gsm8k: 3 of 4 problems have no output, and are not counted" in result.stderr
    assert result.stdout.splitlines()[1].split()[:4] == ["gsm8k", "1", "1", "100.00"]


def test_a_file_of_ones_own(tmp_path: Path):
    records = write_lines(tmp_path / "own.jsonl", [{"q": "2 + 2?", "a": "Sum: 4"}, {"q": "3 + 3?", "a": "Sum: 6"}])
    rows = [{"task": "own", "id": i, "output": "Sum: 4"} for i in range(2)]
    result = call_tool(
        evaluate.main, "--predictions", write_lines(tmp_path / "outputs.jsonl", rows), "--records", records,
        "--marker", "Sum:", "--prompt-field", "q", "--response-field", "a", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.stdout.splitlines()[1].split()[:4] == ["own", "2", "1", "50.00"], result.stderr


def test_gold_answers_of_gsm8k_are_all_right(shared_data: Path, tmp_path: Path):
    path = shared_data / "gsm8k" / "test_query_response.jsonl"
    golden = [json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{"task": "gsm8k", "id": i, "output": text} for i, text in enumerate(golden)]
    predictions = write_lines(tmp_path / "outputs.jsonl", rows)
    result = call_tool(evaluate.main, "--predictions", predictions, "--data", shared_data, "--output", tmp_path / "out")
    assert result.stdout.splitlines()[1].split()[:4] == ["gsm8k", "1319", "1319", "100.00"]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (outputs(["1"]), ["--tasks", "gsm9k"], "--tasks: there is no task 'gsm9k'; known are gsm8k, math, humaneval"),
        (outputs(["1"], "gsm9k"), [], "--tasks: there is no task 'gsm9k'; known are gsm8k, math, humaneval"),
        (outputs(["1"]), ["--tasks", "own"], "--tasks: there is no task 'own'; name its file with --records"),
        (outputs(["1"]), ["--limit", "0"], "--limit: must be a whole number above 0, not 0"),
        (outputs(["1"]), ["--tasks", "hellaswag"], "--data: DATA has no file of hellaswag; looked for"),
        (outputs(["1"]), ["--tasks", "gsm8k,boolq"], "--predictions: has no output of boolq to any of the 2 problems"),
        (outputs(["1"]), ["--temperature", "1"], "--temperature: is for asking a model; --predictions has its answers"),
        (outputs(["1"]), ["--samples", "3"], "--samples: is for asking a model; --predictions has its answers"),
        (outputs(["1"]), ["--stop", "x"], "--stop: is for asking a model; --predictions has its answers"),
        (outputs(["1"]), ["--source", "gsm8k"], "--source: must be TASK=PATH, with one of gsm8k, not 'gsm8k'"),
        (outputs(["1"]), ["--source", "gsm8k=no.jsonl"], "gsm8k: cannot read no.jsonl: No such file"),
        (outputs(["1"]), ["--records", "own.jsonl"], "--marker: missing"),
        (outputs(["1"]), ["--marker", "x"], "--marker: is for a file of your own"),
        (outputs(["1"]), ["--against", "no.jsonl"], "--against: cannot read no.jsonl: No such file"),
        (outputs(["1"] * 5), [], "outputs.jsonl:5: gsm8k has no problem '4'"),
        (outputs(["1"]) * 2, [], "outputs.jsonl:2: gsm8k 0 was answered before"),
        ([{"task": "gsm8k", "id": 1}], [], 'outputs.jsonl:1: needs "task", "id" and "output"; it has task, id'),
    ],
)
def test_bad_input_is_one_line(rows: list[dict], arguments: list[str], message: str, data: Path, tmp_path: Path):
    predictions = write_lines(tmp_path / "outputs.jsonl", rows)
    fixed = ["--predictions", predictions, "--data", data, "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *fixed, *arguments))
    assert message.replace("DATA", str(data)) in line
    assert not (tmp_path / "out").exists()


def test_nobody_answers_or_nothing_can_be_read(data: Path, tmp_path: Path):
    (line,) = error_lines(call_tool(evaluate.main, "--data", data, "--output", tmp_path / "out"))
    assert "a model or --predictions, one of them, is needed" in line
    arguments = ["--predictions", tmp_path / "none.jsonl", "--data", data, "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *arguments))
    assert "cannot read" in line
    predictions = write_lines(tmp_path / "outputs.jsonl", outputs(["1"]))
    (line,) = error_lines(call_tool(evaluate.main, "--predictions", predictions, "--output", tmp_path / "out"))
    assert "--data: missing: the directory with the file of gsm8k" in line


# ---------------------------------------------------------------------------------------------------------------------
# A model answers


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    """A real model of 260,032 parameters."""
    return shared_data / "stories260k-hf"


def ask(model: Path, data: Path, output: Path, *arguments: object):
    fixed = ["--data", data, "--output", output, "--batch-size", 5, "--dtype", "float32", "--device", "cpu"]
    return call_tool(evaluate.main, model, *fixed, *arguments)


@pytest.fixture(scope="module")
def asked(stories: Path, shared_data: Path, tmp_path_factory) -> Path:
    """Two tasks asked, natively."""
    output = tmp_path_factory.mktemp("evaluate") / "native"
    arguments = ["--tasks", "gsm8k,boolq", "--limit", 12, "--max-new-tokens", 24]
    result = ask(stories, shared_data, output, *arguments)
    assert result.returncode == 0, result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [["gsm8k", "12"], ["boolq", "12"]]
    assert "gsm8k: 100%" in result.stderr
    assert "576 tokens in" in result.stderr
    return output


def test_prompts_are_those_of_the_protocol(asked: Path):
    lines = (asked / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {(row["task"], row["id"]): row for row in map(json.loads, lines)}
    assert len(rows) == 24
    assert rows["gsm8k", "0"]["prompt"].startswith(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nJanet"
    )
    assert rows["gsm8k", "0"]["prompt"].endswith("?\n\n### Response: Let's think step by step.")
    assert rows["boolq", "0"]["prompt"].endswith("Answer format: true/false\n\n### Response:")


def test_transformers_answers_the_same(asked: Path, stories: Path, shared_data: Path, tmp_path: Path):
    """Greedily (GSM8K) and with four beams (BoolQ)."""
    pytest.importorskip("transformers")
    arguments = ["--tasks", "gsm8k,boolq", "--limit", 12, "--max-new-tokens", 24, "--backend", "transformers"]
    result = ask(stories, shared_data, tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == (asked / "samples.jsonl").read_bytes()


def test_a_torn_evaluation_goes_on_to_the_same_files(asked: Path, stories: Path, shared_data: Path, tmp_path: Path):
    """Which is also: the same model twice gives the same files."""
    shutil.copytree(asked, tmp_path / "out")
    content = (asked / "samples.jsonl").read_bytes()
    (tmp_path / "out" / "samples.jsonl").write_bytes(content[: len(content) // 2])
    (tmp_path / "out" / "summary.json").unlink()
    arguments = ["--tasks", "gsm8k,boolq", "--limit", 12, "--max-new-tokens", 24]
    assert ask(stories, shared_data, tmp_path / "out", *arguments).returncode == 0
    for name in ("samples.jsonl", "summary.json", "evaluation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (asked / name).read_bytes()
    (line,) = error_lines(ask(stories, shared_data, tmp_path / "out", *arguments[:-1], 25))
    assert "has an evaluation with another max_new_tokens (24, not 25)" in line
    predictions = ["--predictions", asked, "--data", shared_data, "--limit", 12, "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *predictions))
    assert "has answers of a model" in line


def test_the_output_may_lie_in_the_models_folder(stories: Path, data: Path, tmp_path: Path):
    """The model is the same all the same; other files of it are another one."""
    model = tmp_path / "model"
    shutil.copytree(stories, model, copy_function=shutil.copyfile)
    options = ["--tasks", "gsm8k", "--limit", 1, "--max-new-tokens", 2]
    results = [ask(model, data, model / "evaluation", *options) for _ in range(2)]
    assert [result.returncode for result in results] == [0, 0], results[1].stderr
    assert results[0].stdout == results[1].stdout
    os.utime(model / "model.safetensors", ns=(0, 1))
    (line,) = error_lines(ask(model, data, model / "evaluation", *options))
    assert "has an evaluation with another model_files" in line


JUDGE_PROMPTS = [
    {"name": name, "system_prompt": "Judge.", "prompt_template": text}
    for name, text in [
        ("single-v1", "{question} {answer}"),
        ("single-math-v1", "{question} {ref_answer_1} {answer}"),
        ("single-v1-multi-turn", "{question_1} {answer_1} {question_2} {answer_2}"),
        ("single-math-v1-multi-turn", "{question_1} {ref_answer_1} {question_2} {ref_answer_2} {answer_1} {answer_2}"),
    ]
]


def test_mt_bench_is_written_for_a_judge_and_judged(stories: Path, shared_data: Path, tmp_path: Path, monkeypatch):
    """A model with a chat template answers both turns; one without is refused."""
    model = tmp_path / "model"
    shutil.copytree(stories, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (model / name).chmod(0o644)
    arguments = ["--tasks", "mt_bench", "--limit", 2, "--max-new-tokens", 4]
    result = ask(model, shared_data, tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "out" / "mt_bench" / "model_answer" / "model.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["question_id"], len(row["choices"][0]["turns"])) for row in rows] == [(81, 2), (82, 2)]
    assert "run there: python gen_judgment.py --model-list model" in result.stderr
    assert not (tmp_path / "out" / "summary.json").exists()
    (line,) = error_lines(ask(stories, shared_data, tmp_path / "none", *arguments))
    assert "chat template" in line
    predictions = write_lines(tmp_path / "outputs.jsonl", outputs(["1"]))
    fixed = ["--predictions", predictions, "--data", shared_data, "--output", tmp_path / "scores"]
    (line,) = error_lines(call_tool(evaluate.main, *fixed, "--tasks", "mt_bench"))
    assert "mt_bench has no score of its own" in line

    # The same command, now with a judge: the model is not asked again. And the file of answers by itself.
    key = "sk-never-shown-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    before, data = path.read_bytes(), tmp_path / "data" / "mt_bench"
    data.mkdir(parents=True)
    for name in ("question.jsonl", "reference_answer_gpt-4.jsonl"):
        shutil.copy(shared_data / "mt_bench" / name, data)
    with serve(lambda asked: says(f"{key} Rating: [[{1 + asked.number % 4}]]")) as service:
        options = ["--judge-url", service.url, "--judge-requests", 1]
        (line,) = error_lines(ask(model, data.parent, tmp_path / "out", *arguments, *options))
        assert "--judge-model: missing" in line
        options += ["--judge-model", "gpt-4"]
        (line,) = error_lines(ask(model, data.parent, tmp_path / "out", *arguments, *options))
        assert (
            "has no file of mt_bench's judge (FastChat's judge_prompts.jsonl); looked for mt_bench/judge_prompts.jsonl"
            in line
        )
        write_lines(data / "judge_prompts.jsonl", JUDGE_PROMPTS)
        result = ask(model, data.parent, tmp_path / "out", *arguments, *options)
        assert result.returncode == 0, result.stderr
        alone = ["--judge-answers", path, "--data", data.parent, "--limit", 2, "--output", tmp_path / "alone"]
        again = call_tool(evaluate.main, *alone, *options)
        assert again.returncode == 0, again.stderr
        assert len(service.questions) == 8
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["mt_bench", "by", "gpt-4", "turn", "1", "turn", "2", "mean"],
        ["writing", "2.00", "3.00", "2.50"],
        ["all", "2.00", "3.00", "2.50"],
        ["mt_bench:", "95%", "interval", "of", "the", "mean", "0.54", "-", "4.46,", "2", "questions"],
    ]
    assert again.stdout == result.stdout
    assert "judge: 100%" in result.stderr
    assert path.read_bytes() == before
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["tasks"], summary["mt_bench"]["score"]) == ({}, 2.5)
    written = [file.read_text() for place in ("out", "alone") for file in (tmp_path / place).rglob("*.json*")]
    assert len(written) == 6
    assert not any(key in text for text in [*written, result.stdout, result.stderr, again.stderr])
    for options, message in [
        (["--judge-answers", path, "--judge-model", "gpt-4"], "--judge-model: needs --judge-url"),
        (["--judge-answers", path, "--tasks", "gsm8k"], "--judge-answers: has answers to mt_bench alone"),
        (["--predictions", predictions, "--judge-url", "http://127.0.0.1:9/v1"], "which --tasks does not name"),
        (["--judge-answers", path, "--predictions", predictions], "one of them, is needed"),
    ]:
        (line,) = error_lines(call_tool(evaluate.main, *options, "--data", shared_data, "--output", tmp_path / "bad"))
        assert message in line


def test_models_that_cannot_answer(stories: Path, data: Path, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stories / name, model)
    for place, arguments, message in [
        (model, [], f"titan_hd: error: {model} holds no tokenizer.json and no tokenizer.model"),
        (model, ["--backend", "transformers"], "holds no tokenizer.json and no tokenizer.model"),
        (tmp_path / "none", [], "holds neither config.json"),
        (stories, ["--prompts", "chat"], f"error: --prompts: chat: {stories} has no chat template"),
        (stories, ["--prompts", "nosuch"], "--prompts: 'nosuch' is neither alpaca, pissa, chat or none"),
        (stories, ["--batch-size", "0"], "--batch-size: must be a whole number above 0, not 0"),
        (stories, ["--predictions", "x.jsonl"], "one of them, is needed"),
    ]:
        (line,) = error_lines(ask(place, data, tmp_path / "out", "--tasks", "gsm8k", *arguments))
        assert message in line
    (line,) = error_lines(ask(stories, data, tmp_path / "out"))
    assert "--tasks: missing" in line
    assert not (tmp_path / "out").exists()
