"""Who answers in tools/evaluate.py: what its options mean to MT-Bench, to a checkpoint and to an adapter."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.kit.commands import call_tool, error_lines
from titan_hd.data.text.chat import load_chat_template
from titan_hd.errors import UserError
from titan_hd.evaluation import mt_bench
from titan_hd.evaluation.adapter_folder import load_adapter_tokenizer
from titan_hd.evaluation.tasks import TASKS, own_task
from tools import evaluate


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(model: Path, monkeypatch, *options: object) -> argparse.Namespace:
    """The options as they are after their check."""
    words = [str(model), "--output", "out", *map(str, options)]
    monkeypatch.setattr("sys.argv", ["tool", *words])
    args = evaluate.parse_arguments()
    evaluate.backends.check(args)
    return args


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", 0.7], "--temperature"),
        (["--temperature", 0.7, "--top-p", 0.5, "--samples", 2], "--temperature"),
        (["--stop", "###"], "--stop"),
        (["--prompts", "alpaca"], "--prompts"),
    ],
)
def test_mt_bench_alone_refuses_what_it_has_no_use_for(options: list, named: str, tmp_path: Path):
    fixed = [tmp_path, "--tasks", "mt_bench", "--data", tmp_path, "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *fixed, *options))
    assert f"error: {named}: is for other tasks; mt_bench is asked once, greedily, through the chat template" in line


def test_greedy_answers_by_the_chat_template_are_what_mt_bench_has(tmp_path: Path, monkeypatch):
    args = given(tmp_path, monkeypatch, "--temperature", 0, "--prompts", "chat")
    assert evaluate.backends.no_use_to_mt_bench(args) == []


def test_settings_say_how_mt_bench_is_asked(tmp_path: Path, monkeypatch):
    """Not how the tasks beside it are."""
    args = given(tmp_path, monkeypatch, "--temperature", 0.7, "--samples", 2, "--stop", "###", "--prompts", "none")
    assert evaluate.backends.no_use_to_mt_bench(args) == ["--temperature", "--samples", "--stop", "--prompts"]
    settings = evaluate.backends.settings(args, {}, [mt_bench.Question(81, ["Hello?"])])
    assert (settings["sampling"]["temperature"], settings["stop"], settings["prompts"]) == (0.7, ["###"], "none")
    about = settings["mt_bench"]
    assert (about["sampling"], about["stop"], about["prompts"]) == (None, [], "chat")
    other = evaluate.backends.settings(args, {}, [mt_bench.Question(81, ["Hi?"])])
    assert other["mt_bench"]["questions"] != about["questions"]


def test_a_model_is_the_same_by_whatever_path(tmp_path: Path, monkeypatch):
    """So are its assets, and a file of prompts."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompt.txt").write_text("{prompt}")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    names = ["model", tmp_path / "model", "./link"]
    prompts = ["prompt.txt", tmp_path / "prompt.txt", "./prompt.txt"]
    first, *others = (
        evaluate.backends.settings(
            given(Path(name), monkeypatch, "--assets", name, "--prompts", prompt), {"gsm8k": "0"}, []
        )
        for name, prompt in zip(names, prompts)
    )
    assert first["model"] == first["assets"] == str((tmp_path / "model").resolve())
    assert others == [first, first]
    os.utime(tmp_path / "model" / "config.json", ns=(0, 1))
    args = given(Path("model"), monkeypatch, "--assets", "model", "--prompts", "prompt.txt")
    assert evaluate.backends.settings(args, {"gsm8k": "0"}, []) != first


def test_outputs_of_unknown_problems_are_refused_with_a_limit(tmp_path: Path):
    """Those beyond the limit are passed over."""
    rows = [{"question": "?", "answer": f"#### {i}"} for i in range(3)]
    problems = write_lines(tmp_path / "test.jsonl", rows)
    said = [{"task": "gsm8k", "id": i, "output": f"The answer is: {i}"} for i in range(3)]
    fixed = ["--source", f"gsm8k={problems}", "--limit", 2, "--output", tmp_path / "out"]
    result = call_tool(evaluate.main, "--predictions", write_lines(tmp_path / "good.jsonl", said), *fixed)
    assert result.stdout.splitlines()[1].split()[:4] == ["gsm8k", "2", "2", "100.00"], result.stderr
    bad = write_lines(tmp_path / "bad.jsonl", [*said, {**said[0], "id": 3}])
    (line,) = error_lines(call_tool(evaluate.main, "--predictions", bad, *fixed))
    assert "bad.jsonl:4: gsm8k has no problem '3'" in line


def test_options_of_a_model_are_refused_beside_answers_to_judge(tmp_path: Path):
    fixed = ["--judge-answers", tmp_path / "x.jsonl", "--output", tmp_path / "out", "--temperature", 1]
    (line,) = error_lines(call_tool(evaluate.main, *fixed))
    assert "--temperature: is for asking a model; --judge-answers has its answers" in line


@pytest.mark.parametrize("backend", ["native", "vllm"])
def test_an_adapter_alone_is_no_model(backend: str, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    arguments = [tmp_path / "adapter", "--backend", backend, "--tasks", "gsm8k", "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *arguments))
    assert f"{tmp_path / 'adapter'}: is an adapter for the peft library, without its model: give the run's" in line
    assert "tools/convert_checkpoint.py" in line


def checkpoint(folder: Path, data: str) -> Path:
    folder.mkdir()
    state = {"step": 3, "identity": {}, "config": f"[data]\n{data}\n"}
    (folder / "train_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("data", "template"),
    [
        ('template = "none"', "none"),
        ("", "pissa"),  # the default of data.template
        ('template = "none"\nformat = "chat"', "chat"),
        ('template = "none"\ntrain = [{path = "a", template = "chat"}, {path = "b", template = "chat"}]', "chat"),
        ('template = "none"\ntrain = [{path = "a", template = "chat"}, {path = "b"}]', None),
        ('template = "none"\nformat = "text"', None),
    ],
)
def test_a_file_of_ones_own_is_asked_as_the_run_was_trained(
    data: str, template: str | None, tmp_path: Path, monkeypatch, capsys
):
    tasks = {"own": own_task("q", "a", "Sum:"), "gsm8k": TASKS["gsm8k"]}
    model = checkpoint(tmp_path / "step-3", data)
    found = evaluate.backends.in_words_of_run(given(model, monkeypatch), tasks)
    assert (found["own"].template, found["gsm8k"]) == (template or "alpaca", TASKS["gsm8k"])
    (line,) = capsys.readouterr().err.splitlines()
    if template:
        assert (
            line
            == f"titan_hd: own: prompts are written by data.template of the run, {template}; --prompts names another"
        )
    else:
        assert "own: prompts are written by alpaca: data of the run has no template, or several" in line
    assert evaluate.backends.in_words_of_run(given(model, monkeypatch, "--prompts", "alpaca"), tasks) is tasks
    assert evaluate.backends.in_words_of_run(given(tmp_path, monkeypatch), tasks) is tasks
    assert capsys.readouterr().err == ""


def test_the_file_of_the_runs_template_may_be_gone(tmp_path: Path, monkeypatch):
    model = checkpoint(tmp_path / "step-3", 'template = "gone.txt"')
    with pytest.raises(UserError, match=r"--prompts: missing, and data\.template of the run is not there: gone\.txt"):
        evaluate.backends.in_words_of_run(given(model, monkeypatch), {"own": own_task("q", "a", "Sum:")})


# ---------------------------------------------------------------------------------------------------------------------
# A model answers


@pytest.fixture(scope="module")
def talker(shared_data: Path, tmp_path_factory) -> Path:
    """A real model of 260,032 parameters, with a chat template."""
    folder = tmp_path_factory.mktemp("backends") / "model"
    shutil.copytree(shared_data / "stories260k-hf", folder, copy_function=shutil.copyfile)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def ask(model: Path, output: Path, *arguments: object):
    fixed = ["--limit", 1, "--max-new-tokens", 2, "--dtype", "float32", "--device", "cpu"]
    return call_tool(evaluate.main, model, "--output", output, *fixed, *arguments)


def test_a_token_beyond_the_embedding_that_nothing_spells(talker: Path, tmp_path: Path, monkeypatch):
    """The <pad> of a fine-tune, for example: what was trained with it can be evaluated."""
    model = tmp_path / "model"
    shutil.copytree(talker, model)
    config, tokenizer = ((model / name) for name in ("config.json", "tokenizer_config.json"))
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "pad_token": "<pad>"}))
    rows = json.loads(config.read_text())["vocab_size"]
    records = write_lines(tmp_path / "own.jsonl", [{"prompt": "Once", "response": "Sum: 1"}])
    result = ask(model, tmp_path / "out", "--records", records, "--marker", "Sum:", "--prompts", "none")
    assert result.returncode == 0, result.stderr
    made: list[tuple] = []
    for name in ("TransformersBackend", "VllmBackend"):
        monkeypatch.setattr(evaluate.backends, name, lambda *options: made.append(options))
    args = given(model, monkeypatch, "--backend", "transformers")
    read = evaluate.backends.load(args)[1]
    assert (read.pad_id, made[0][3]) == (rows, read.eos_id)
    args = given(model, monkeypatch, "--backend", "vllm")
    assert evaluate.backends.load(args)[1].pad_id == rows
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": rows - 1}))
    for backend in ("transformers", "vllm"):
        with pytest.raises(UserError, match=rf"^{model}: the tokenizer has {rows + 1} ids, the model's vocabulary"):
            evaluate.backends.load(given(model, monkeypatch, "--backend", backend))


def test_beside_other_tasks_a_warning_says_what_mt_bench_passes_over(talker: Path, shared_data: Path, tmp_path: Path):
    options = ["--tasks", "gsm8k,mt_bench", "--data", shared_data, "--temperature", 0.7, "--stop", "###"]
    result = ask(talker, tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    said = "titan_hd: warning: --temperature, --stop: not for mt_bench, only for the other tasks; mt_bench is asked"
    assert result.stderr.count(said) == 1
    assert (tmp_path / "out" / "mt_bench" / "model_answer" / "model.jsonl").is_file()


def test_a_file_of_ones_own_by_the_template_that_is_found(talker: Path, tmp_path: Path, monkeypatch):
    records = write_lines(tmp_path / "own.jsonl", [{"prompt": "Once", "response": "Sum: 1"}])

    def found(args: argparse.Namespace, tasks: dict) -> dict:
        return {"own": dataclasses.replace(tasks["own"], template="none")}

    monkeypatch.setattr(evaluate.backends, "in_words_of_run", found)
    result = ask(talker, tmp_path / "out", "--records", records, "--marker", "Sum:")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text())["prompt"] == "Once"


def test_an_adapter_answers_by_transformers(shared_data: Path, tmp_path: Path, monkeypatch):
    """As its merged model does in our decoder, and otherwise than its base."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, adapter, merged = shared_data / "stories260k-hf", tmp_path / "adapter", tmp_path / "merged"
    torch.manual_seed(0)
    about = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), about)
    model.save_pretrained(adapter)
    shutil.copytree(base, merged, copy_function=shutil.copyfile)
    model.merge_and_unload().save_pretrained(merged)
    records = write_lines(tmp_path / "own.jsonl", [{"prompt": f"Once {i}", "response": "Sum: 1"} for i in range(4)])
    options = ["--records", records, "--marker", "Sum:", "--prompts", "none", "--limit", 4, "--max-new-tokens", 12]

    def samples(name: str, place: Path, *others: object) -> str:
        result = ask(place, tmp_path / name, *options, *others)
        assert result.returncode == 0, result.stderr
        return (tmp_path / name / "samples.jsonl").read_text()

    theirs = samples("theirs", adapter, "--backend", "transformers")  # its configuration has the path of its model
    assert theirs == samples("ours", merged) != samples("base", base)

    # As our export has it: its model has a name alone.
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "stories"}))
    wrong = [adapter, tmp_path / "no", *options, "--backend", "transformers"]
    for others, message in [
        ([], f"--assets: missing: {adapter} is an adapter of the model 'stories'; name its HF directory"),
        (["--assets", tmp_path], f"--assets: {tmp_path} has no config.json: must be the HF directory of the adapter's"),
    ]:
        (line,) = error_lines(ask(*wrong, *others))
        assert message in line
    assert theirs == samples("named", adapter, "--backend", "transformers", "--assets", base)
    monkeypatch.setitem(sys.modules, "peft", None)
    (line,) = error_lines(ask(*wrong, "--assets", base))
    assert "is an adapter, which needs the package peft: pip install peft" in line
    (adapter / "adapter_model.safetensors").unlink()
    (line,) = error_lines(ask(*wrong, "--assets", base))
    assert "has adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin" in line


def test_what_lies_beside_an_adapter_goes_before_its_models(shared_data: Path, tmp_path: Path):
    base = shared_data / "stories260k-hf"
    plain = load_adapter_tokenizer(tmp_path, base)
    assert (plain.directory, 7 in plain.stop_ids) == (base, False)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_adapter_tokenizer(tmp_path, base)
    assert tokenizer.stop_ids == plain.stop_ids | {7}
    assert load_chat_template(tokenizer).render([{"role": "user", "content": "Hi"}]) == "Hi!"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, tmp_path / name)
    assert load_adapter_tokenizer(tmp_path, tmp_path / "none").directory == tmp_path
