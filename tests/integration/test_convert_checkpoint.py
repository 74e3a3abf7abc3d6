"""tools/convert_checkpoint.py as a user runs it: checkpoints become exports, and weights survive both ways."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY, call_tool, error_lines
from tests.kit.tokenizers import llama3_directory
from tools import convert_checkpoint, rank_analysis


def convert(*arguments) -> subprocess.CompletedProcess:
    return call_tool(convert_checkpoint.main, *arguments)


def convert_as_a_user(*arguments) -> subprocess.CompletedProcess:
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(tool, capture_output=True, text=True, env=CPU_ONLY, timeout=120, check=False)


def assert_same_spectra(base: Path, step: Path, export: Path, folder: Path) -> None:
    """dW is read from a checkpoint, with its adapter merged in, as from the fp32 export of its run."""
    names = (f"checkpoint={step}", f"export={export}")
    result = call_tool(rank_analysis.main, base, *names, "--output", folder, "--threshold", "1e-6")
    assert result.returncode == 0, result.stderr
    spectra: dict[str, list[str]] = {"checkpoint": [], "export": []}
    for row in (folder / "spectrum.csv").read_text().splitlines()[1:]:
        name, _, rest = row.partition(",")
        spectra[name].append(rest)
    assert spectra["checkpoint"] == spectra["export"]
    assert any(not rest.endswith(",0.0000000000e+00") for rest in spectra["export"])


@pytest.fixture(params=["hdpissa", pytest.param("dora", marks=pytest.mark.slow)])
def run(request, workers, tmp_path):
    """A run on four workers (FSDP 2 x tensor 2), with a checkpoint of its last step and an export of it."""
    runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    runs.write_records(tmp_path / "records.jsonl")
    changes = {"checkpoint__enable": "true", "parallelism__tensor_parallel_degree": 2, "training__steps": 2}
    changes |= {"training__global_batch_size": 2, "adapter__method": request.param}
    if request.param == "hdpissa":
        changes |= {"hdpissa__num_adapters": 2}
    argv = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "dump", **changes)
    workers.run(4, runs.train, argv)
    return tmp_path / "dump"


def test_a_checkpoint_becomes_the_export_of_its_run(run, request, tmp_path):
    step, out = run / "checkpoint" / "step-2", tmp_path / "out"
    result = convert("dcp-to-hf", step, out, "--assets", tmp_path / "model")
    assert result.returncode == 0, result.stderr
    got, want = load_file(out / "model.safetensors"), runs.exported(run)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads((out / "config.json").read_text()) == json.loads((run / "hf" / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert f"| adapter.method | {request.node.callspec.params['run']} |" in card
    assert "| step | 2 |" in card
    assert_same_spectra(tmp_path / "model", step, run / "hf", tmp_path / "ranks")

    # Again, over itself, in bf16 and small files.
    result = convert(
        *("dcp-to-hf", step, out, "--assets", tmp_path / "model"),
        *("--dtype", "bfloat16", "--max-shard-size-gb", "0.00001"),
    )
    assert result.returncode == 0, result.stderr
    paths = sorted(out.glob("*.safetensors"))
    assert len(paths) > 1
    got = {name: value for path in paths for name, value in load_file(path).items()}
    assert all(torch.equal(got[name], want[name].bfloat16()) for name in want)

    (tmp_path / "model" / "config.json").write_text(json.dumps({**runs.ODD, "num_hidden_layers": 3}))
    lines = error_lines(convert("dcp-to-hf", step, tmp_path / "other", "--assets", tmp_path / "model"))
    assert f"titan_hd: error: {step}: model.model.layers.2.mlp.up_proj.weight: is missing" in lines
    shape = "model.model.layers.0.mlp.up_proj.weight: has shape [38, 22], must be [37, 22]"
    assert f"titan_hd: error: {step}: {shape}" in lines
    assert not (tmp_path / "other").exists()

    runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    shard = max(step.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    (line,) = error_lines(convert("dcp-to-hf", step, tmp_path / "other", "--assets", tmp_path / "model"))
    assert f"{shard}: has 100 bytes, must have " in line
    assert not (tmp_path / "other").exists()
    (step / ".metadata").write_bytes(b"torn")
    (line,) = error_lines(convert("dcp-to-hf", step, tmp_path / "other", "--assets", tmp_path / "model"))
    assert ".metadata: cannot be read" in line


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_what_was_trained_on_chats_can_be_asked(format: str, workers, tmp_path):
    """A base model without a chat template: the run's export and that of its checkpoint have the one that was used, and
    stop where the answers ended; an adapter has both beside it."""
    runs.write_model(tmp_path / "model", vocab_size=400, eos_token_id=1)
    llama3_directory(tmp_path / "model")
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    changes = {"data__format": "chat", "training__steps": 1, "checkpoint__enable": "true", "training__seq_len": 32}
    changes |= {"adapter__method": "lora", "export__format": format}
    workers.run(1, runs.train, runs.options(tmp_path / "model", tmp_path / "chats.jsonl", tmp_path / "dump", **changes))
    folders = [tmp_path / "dump" / "hf"]
    if format == "hf":
        step = tmp_path / "dump" / "checkpoint" / "step-1"
        result = convert("dcp-to-hf", step, tmp_path / "out", "--assets", tmp_path / "model")
        assert result.returncode == 0, result.stderr
        folders.append(tmp_path / "out")
        assert_same_spectra(tmp_path / "model", step, tmp_path / "dump" / "hf", tmp_path / "ranks")
        # What the checkpoint left out is the base model's: another one is no base of it.
        runs.write_model(tmp_path / "other", seed=1, vocab_size=400, eos_token_id=1)
        (line,) = error_lines(call_tool(rank_analysis.main, tmp_path / "other", step, "--output", tmp_path / "ranks"))
        assert f"BASE: {tmp_path / 'other'}: its weights are not those that the checkpoint {step} builds on" in line
    for folder in folders:
        assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [1, 4]}
        assert "<|start_header_id|>" in (folder / "chat_template.jinja").read_text()


def test_weights_survive_both_ways(tmp_path):
    _, weights = runs.write_model(tmp_path / "model", tie_word_embeddings=True)
    result = convert_as_a_user("hf-to-dcp", tmp_path / "model", tmp_path / "dcp")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == len(weights), "a file for each tensor"

    result = convert("dcp-to-hf", tmp_path / "dcp", tmp_path / "hf", "--assets", tmp_path / "model")
    assert result.returncode == 0, result.stderr
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], value) for name, value in weights.items())


def test_what_is_refused(tmp_path):
    runs.write_model(tmp_path / "model")
    (line,) = error_lines(convert("dcp-to-hf", tmp_path / "model", tmp_path / "out", "--assets", tmp_path / "model"))
    assert "is no checkpoint: it holds no .metadata" in line
    (line,) = error_lines(convert("hf-to-dcp", tmp_path / "model", tmp_path / "model"))
    assert "is there already" in line
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "of_a_run").touch()
    (line,) = error_lines(convert("hf-to-dcp", tmp_path / "model", tmp_path / "out"))
    assert f"{tmp_path / 'out.partial'}: is there already" in line
    assert (tmp_path / "out.partial" / "of_a_run").exists()
    bad = load_file(tmp_path / "model" / "model.safetensors")
    runs.write_model(tmp_path / "bad")
    bad["model.norm.weight"][0] = float("nan")
    save_file(bad, tmp_path / "bad" / "model.safetensors")
    (line,) = error_lines(convert("hf-to-dcp", tmp_path / "bad", tmp_path / "new"))
    assert "bad/model.safetensors: model.norm.weight: holds a value that is NaN or infinite" in line
    assert not (tmp_path / "new.partial").exists()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    (line,) = error_lines(convert("hf-to-dcp", tmp_path / "model", tmp_path / "other"))
    assert "pytorch_model.bin is pickled" in line
