"""tools/generate.py as a user runs it: from a directory, from a checkpoint, prompts from anywhere, and bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY, call_tool
from tests.kit.forked import run_forked
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.errors import UserError
from tools import evaluate, generate

WORDS = ["<unk>", "</s>", "<s>", "<e>", *(f"w{i}" for i in range(46))]
CHAT = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} <e> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "<s>", "<e>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def trained(workers, tmp_path_factory) -> Path:
    """A run of two steps with checkpoints and an export, by two workers."""
    folder = tmp_path_factory.mktemp("generate")
    runs.write_model(folder / "model")
    write_tokenizer(folder / "model")
    runs.write_records(folder / "records.jsonl")
    argv = runs.options(
        folder / "model",
        folder / "records.jsonl",
        folder / "dump",
        training__steps=2,
        optimizer__lr=0.3,
        checkpoint__enable="true",
        hdpissa__slices="random",
    )
    workers.run(2, runs.train, argv)
    return folder


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    return run_forked("tools/generate.py", *arguments, stdin=stdin)


@pytest.fixture
def call(monkeypatch, capsys):
    """The tool inside this process; returns status, output and errors."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        monkeypatch.setattr(generate.torch.cuda, "is_available", lambda: False)
        status = 0
        try:
            generate.main()
        except SystemExit as left:
            status = left.code
        return (status, *capsys.readouterr())

    return call


def test_directory_and_checkpoint_give_the_same_text(trained: Path, call):
    """The exported model and the checkpoint of the same step, each in a process of its own."""
    prompts = "w3 w4 w5\nw7\nw8 w9\nw20 w1\n"
    exported = run(trained / "dump" / "hf", "--max_new_tokens", 12, stdin=prompts)
    assert exported.returncode == 0, exported.stderr
    assert len(exported.stdout.splitlines()) == 4
    assert len(exported.stdout.split()) > 4
    assert " tokens/s" in exported.stderr
    saved = run(trained / "dump" / "checkpoint" / "step-2", "--max_new_tokens", 12, stdin=prompts)
    assert saved.returncode == 0, saved.stderr
    assert saved.stdout == exported.stdout
    status, start, _ = call(trained / "model", "--max_new_tokens", 12, stdin=prompts)
    assert status == 0
    assert start != exported.stdout  # two steps were enough to see


def test_assets_and_dtype(trained: Path, call):
    """The run's directory may be elsewhere now; weights are rounded as they are loaded."""
    step = trained / "dump" / "checkpoint" / "step-2"
    options = ("--prompt", "w8 w9", "--max_new_tokens", 12, "--dtype", "bfloat16", "--temperature", 5)
    there = call(trained / "dump" / "hf", *options)
    assert there[0] == 0
    assert there[1].strip()
    assert call(step, *options, "--assets", trained / "dump" / "hf")[:2] == there[:2]


def test_an_evaluation_asks_a_checkpoint_as_its_export(trained: Path, tmp_path: Path):
    records = [{"prompt": f"w{i} w{i + 1}", "response": "w9 w8"} for i in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--records", tmp_path / "own.jsonl", "--marker", "w9", "--max-new-tokens", 6, "--batch-size", 2]
    for model in ("hf", "checkpoint/step-2"):
        output = tmp_path / model
        result = call_tool(evaluate.main, trained / "dump" / model, *options, "--prompts", "none", "--output", output)
        assert result.returncode == 0, result.stderr
    samples = (tmp_path / "checkpoint" / "step-2" / "samples.jsonl").read_text()
    assert samples == (tmp_path / "hf" / "samples.jsonl").read_text()
    assert len(samples.splitlines()) == 5


def test_prompts_from_anywhere_are_the_same_prompts(trained: Path, call, tmp_path: Path):
    """One by one from the standard input, or in batches from files, greedily and sampled."""
    prompts = ["w3 w4 w5", "w7", "w1 w2 w3 w4 w5 w6 w7 w8"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question": p, "answer": "x"}) + "\n" for p in prompts))
    texts = []
    for sampling in ((), ("--temperature", 1, "--top_k", 20, "--top_p", 0.9, "--seed", 5)):
        options = (trained / "model", "--max_new_tokens", 8, *sampling)
        status, out, _ = call(*options, stdin="\ufeff" + "\n".join(prompts))  # as editors of Windows begin a text
        assert status == 0
        lines = out.splitlines()
        assert len(lines) == 3
        for name in ("p.txt", "p.jsonl"):
            status, out, err = call(*options, "--file", tmp_path / name, "--batch_size", 2)
            records = [json.loads(line) for line in out.splitlines()]
            assert [record["prompt"] for record in records] == prompts
            assert [record["response"].split() for record in records] == [line.split() for line in lines]
            assert " tokens/s" in err
        texts.append(lines)
    assert texts[0] != texts[1]


def test_a_template_is_applied(trained: Path, call, tmp_path: Path):
    (tmp_path / "t.txt").write_text("w9 {prompt} w10")
    options = (trained / "model", "--max_new_tokens", 8)
    by_template = call(*options, "--prompt", "w3", "--template", tmp_path / "t.txt")
    assert by_template[:2] == call(*options, "--prompt", "w9 w3 w10")[:2]
    assert by_template[1] != call(*options, "--prompt", "w3")[1]


def test_chat(trained: Path, call):
    options = (trained / "model", "--max_new_tokens", 8)
    answer = call(*options, "--chat", "w3 w4", "--system", "w5")
    assert answer[0] == 0
    assert answer[1].strip()
    (trained / "turns.txt").write_text("<s> system w5 <e> <s> user {prompt} <e> <s> assistant ")
    assert answer[:2] == call(*options, "--prompt", "w3 w4", "--template", trained / "turns.txt")[:2]


def test_an_answer_ends_with_the_turn(trained: Path):
    """The tokenizer's own stop token is </s>; a model trained on chats ends its answers as the template does."""
    tokenizer = generate.load_tokenizer(trained / "model")
    assert generate.load_template("chat", tokenizer).stop_ids(tokenizer) == {WORDS.index("<e>"), WORDS.index("</s>")}


def test_a_chat_at_a_terminal(trained: Path, call):
    """Each answer continues all that was said; the end of the input ends the chat."""
    options = (trained / "model", "--max_new_tokens", 8)
    first = call(*options, "--chat", "w3")[1].strip()
    (trained / "turns.txt").write_text(
        f"<s> user w3 <e> <s> assistant {first} <e> <s> user {{prompt}} <e> <s> assistant "
    )
    second = call(*options, "--prompt", "w4", "--template", trained / "turns.txt")[1].strip()
    terminal, theirs = pty.openpty()
    os.write(terminal, b"w3\nw4\n\x04")
    tool = [sys.executable, str(REPOSITORY / "tools" / "generate.py"), *map(str, options)]
    done = subprocess.run(tool, env=CPU_ONLY, stdin=theirs, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [part.strip() for part in done.stdout.split("> ")] == ["", first, second, ""]


FAULTS = [
    (["{none}"], "holds neither config.json (a HF directory) nor train_state.json (a checkpoint)"),
    (["{checkpoint}"], "it has step-2: name one of them"),
    (["{model}", "--assets", "{model}"], "--assets: {model} is a HF directory and has its own"),
    (["{step}", "--assets", "{none}"], "--assets: no such directory: {none}"),
    (["{step}", "--assets", "{other}"], "--assets: {other}: its config.json is not that of the checkpoint's model"),
    (["{model}", "--temperature", "-1"], "temperature: must be a number from 0, not -1.0"),
    (["{model}", "--top_p", "0"], "top_p: must be above 0 and at most 1, not 0.0"),
    (["{model}", "--top_k", "1.5"], "argument --top-k: invalid int value: '1.5'"),
    (["{model}", "--max_new_tokens", "0"], "--max-new-tokens: must be a whole number above 0, not 0"),
    (["{model}", "--system", "x", "--prompt", "w1"], "--system: is for a chat"),
    (["{model}", "--chat", "x", "--template", "none"], "--template: is for prompts"),
    (["{model}", "--prompt", "x", "--chat", "x"], "not allowed with argument"),
    (["{model}", "--prompt", ""], "prompt 0: is empty"),
    (["{model}", "--prompt", "w1", "--template", "{none}"], "is neither alpaca, pissa, chat or none nor a text file"),
    (["{model}", "--file", "{none}"], "--file: cannot read {none}: No such file or directory"),
    (["{model}", "--file", "{records}"], "records.jsonl:1: needs one of instruction, query, question, prompt"),
    (["{model}", "--prompt", "w1", "--device", "abacus"], "--device: abacus cannot be used: "),
    (["{model}", "--prompt", "w1", "--device", "meta"], "--device: must be cpu, cuda or cuda:N, not meta"),
    ([], "the following arguments are required: model"),
]


@pytest.mark.parametrize(("arguments", "line"), FAULTS, ids=lambda value: " ".join(value) if value else "nothing")
def test_faults_are_one_line(trained: Path, call, tmp_path: Path, arguments: list[str], line: str):
    runs.write_model(tmp_path / "other", rope_theta=5e5)
    names = {
        "none": tmp_path / "none",
        "model": trained / "model",
        "checkpoint": trained / "dump" / "checkpoint",
        "step": trained / "dump" / "checkpoint" / "step-2",
        "other": tmp_path / "other",
        "records": trained / "records.jsonl",
    }
    status, out, err = call(*(argument.format(**names) for argument in arguments))
    assert status == 2
    assert out == ""
    (said,) = err.splitlines()
    assert said.startswith("titan_hd: error: ")
    assert line.format(**names) in said


def _no_state(step: Path) -> None:
    (step / "train_state.json").write_text("{}")


def _no_metadata(step: Path) -> None:
    (step / ".metadata").write_bytes(b"\x80\x04torn")


def _no_data(step: Path) -> None:
    path = next(step.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:100])


def _one_bit(step: Path) -> None:
    """In a weight: nothing but its checksum knows."""
    path = next(step.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (_no_state, "train_state.json: is not the state of a titan_hd run: KeyError: 'config'"),
        (_no_metadata, ".metadata: cannot be read: "),
        (_no_data, ".distcp: has 100 bytes, must have "),
        (_one_bit, ".distcp: its content has changed since it was written"),
    ],
)
def test_a_torn_checkpoint_is_one_line(trained: Path, call, tmp_path: Path, break_it, line: str):
    step = tmp_path / "step-2"
    shutil.copytree(trained / "dump" / "checkpoint" / "step-2", step)
    break_it(step)
    status, _, err = call(step, "--prompt", "w3")
    assert status == 2
    (said,) = err.splitlines()
    assert line in said


def test_a_pickle_runs_no_code(trained: Path, call, tmp_path: Path):
    """Whatever else lies beside it: train_state.json proves nothing about who wrote the folder."""
    step = tmp_path / "step-2"
    shutil.copytree(trained / "dump" / "checkpoint" / "step-2", step)
    (step / ".metadata").write_bytes(pickle.dumps(Touch(str(tmp_path / "touched"))))
    status, _, err = call(step, "--prompt", "w3")
    assert status == 2
    assert "open, which is no part of a table of contents" in err
    assert not (tmp_path / "touched").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_checkpoint_with_more_than_the_model_is_refused(trained: Path, tmp_path: Path):
    """Weights of a method beside the model's own would be lost without a word."""
    dcp.save({"model.extra": torch.zeros(2)}, checkpoint_id=str(tmp_path), no_dist=True)
    with pytest.raises(UserError) as caught:
        CheckpointReader(tmp_path).tensor_dtypes({"norm": torch.Size([2])})
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: model.extra: is not part of the model",
        f"{tmp_path}: model.norm: is missing",
    ]
