"""`run_train.sh` as a user runs it: whole runs, the export in transformers, and bad input."""

import json
import os
import subprocess
import time

import pytest
import torch

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY, error_lines, run_train, start_train
from titan_hd.errors import UserError

# Logits of the same fp32 weights by two implementations.
LOGITS_TOLERANCE = 1e-5


@pytest.fixture
def setup(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    (tmp_path / "run.toml").write_text("[training]\nsteps = 3\nmixed_precision_param = 'float32'\n")

    def arguments(**overrides) -> list[str]:
        values = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "dump", **overrides)
        return ["--config", str(tmp_path / "run.toml"), *values]

    return arguments


def test_a_run_leaves_metrics_and_a_model_that_transformers_opens(setup, tmp_path):
    transformers = pytest.importorskip("transformers")
    runs.write_model(tmp_path / "model", hidden_size=24)  # transformers wants a multiple of the heads
    result = run_train(*setup(hdpissa__num_adapters=4, metrics__enable_wandb="true"), WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "dump" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gib"} <= records[0].keys()
    assert list((tmp_path / "dump" / "wandb").glob("offline-run-*"))

    from titan_hd.models.decoder import Decoder
    from titan_hd.models.registry import read_hf_config

    folder = tmp_path / "dump" / "hf"
    ours = Decoder(read_hf_config(folder))
    ours.load_state_dict(runs.exported(tmp_path / "dump"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < LOGITS_TOLERANCE


def test_an_outage_of_wandb_does_not_stop_the_run(setup, tmp_path, monkeypatch):
    """The worst of outages: wandb itself raises whenever it is called."""
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text(
        "Settings = dict\ndef init(**kwargs):\n    raise OSError('no route to host')\n"
    )
    result = run_train(
        *setup(metrics__enable_wandb="true", export__enable="false"), workers=1, PYTHONPATH=str(tmp_path / "broken")
    )
    assert result.returncode == 0, result.stderr
    assert "no route to host" in result.stderr


def test_faults_of_the_configuration_come_all_at_once_before_any_process(setup, tmp_path):
    result = run_train(*setup(optimzer__lr=1, training__steps="three", adapter__dropout=2))
    keys = [line.split(": ")[2] for line in error_lines(result)]
    assert sorted(keys) == ["adapter.dropout", "optimzer.lr", "training.steps"]
    assert not (tmp_path / "dump").exists()


def test_faults_that_need_the_model_and_the_workers(setup, tmp_path):
    """Found without torch's compiler, whose import would make every start a second longer."""
    result = run_train(
        *setup(
            adapter__rank=4,
            hdpissa__num_adapters=4,
            training__global_batch_size=6,
            data__validation="/nowhere/validation.jsonl",
            optimizer__name="Adamant",
        ),
        PYTHONPROFILEIMPORTTIME="1",
    )
    keys = [line.split(": ")[2] for line in error_lines(result)]
    assert sorted(keys) == ["adapter.rank", "data.validation", "optimizer.name", "training.global_batch_size"]
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch.distributed" in imported
    assert "torch._dynamo" not in imported
    assert not (tmp_path / "dump").exists()


def test_a_bad_record_is_named_with_file_and_line(setup, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text() + '{"input_ids": [1, 2], "labels": [1]}\n')
    start = time.monotonic()
    result = run_train(*setup())
    (line,) = error_lines(result)
    assert f"{path}:25: labels" in line
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 60, "no rank may wait for another's collective"


def fails_with(argv: list[str]) -> str:
    try:
        runs.train(argv)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fault", ["record", "weights", "one rank"])
def test_every_rank_gets_the_same_line(fault, workers, setup, tmp_path):
    """Including a fault that only one rank meets: it must not leave the others waiting."""
    argv = setup()[2:]
    if fault == "record":
        (tmp_path / "records.jsonl").write_text("nonsense\n")
        expected = f"{tmp_path / 'records.jsonl'}:1: not valid JSON"
    elif fault == "weights":
        weights = runs.load_file(tmp_path / "model" / "model.safetensors")
        del weights["lm_head.weight"]
        runs.save_file(weights, tmp_path / "model" / "model.safetensors")
        expected = "lm_head.weight: is missing"
    else:
        expected = "cannot read the disk of this rank (on rank 1, a test)"
        messages = workers.run(2, fails_on_rank_one)
        assert messages == [expected] * 2
        return
    messages = workers.run(2, fails_with, argv)
    assert expected in messages[0]
    assert len(set(messages)) == 1


def fails_on_rank_one() -> str:
    import torch.distributed as dist

    from titan_hd.distributed.collectives import raise_on_all

    try:
        with raise_on_all("a test"):
            if dist.get_rank() == 1:
                raise UserError("cannot read the disk of this rank")
    except UserError as error:
        return str(error)
    return ""


def test_a_killed_worker_ends_the_run_with_its_signal(setup, tmp_path):
    """The exit status tells the truth: 128 + 9, within seconds, and no worker is left."""
    run = start_train(*setup(training__steps=100000))
    metrics = tmp_path / "dump" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.2)
    pattern = f"titan_hd.train .*{tmp_path}"
    pids = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout.split()
    children = [int(pid) for pid in pids if int(pid) != run.process.pid]
    os.kill(children[-1], 9)
    status, stderr = run.end(timeout=90)
    assert status == 137, stderr
    assert "ended with signal 9" in stderr
    assert not subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout


def test_the_quick_start_shortened(tmp_path):
    """`./run_train.sh --quickstart`, cut to a few steps: from any folder, validation of two sets, accuracy, export, the
    page of its curves."""
    plain = {"name": "plain", "path": str(tmp_path / "plain.jsonl"), "format": "text"}
    (tmp_path / "plain.jsonl").write_text('{"text": "Rosa has 87 coins."}\n')
    result = run_train(
        "--quickstart",
        "--data.validation=" + json.dumps([{"name": "problems", "path": "assets/quickstart/validation.jsonl"}, plain]),
        "--training.steps=3",
        "--validation.exact_match_samples=8",
        "--validation.batch_size=5",
        "--metrics.log_freq=1",
        f"--job.dump_folder={tmp_path / 'quickstart'}",
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    validations = [r for r in records if "validation_exact_match" in r]
    assert [r["step"] for r in validations] == [0, 3]
    assert [[*r] for r in validations] == [
        ["step", "validation_loss", "validation_exact_match", "validation_loss/plain"]
    ] * 2
    assert "data.validation[plain]: its loss is measured, but no exact match" in result.stderr
    assert {p.name for p in (tmp_path / "quickstart" / "hf").iterdir()} >= {"config.json", "model.safetensors"}
    page = tmp_path / "quickstart" / "plots" / "run.html"
    assert result.stdout.splitlines()[-1] == f"the curves of this run: {page}"
    assert all(f'<figure id="{name}">' in page.read_text() for name in ("loss", "validation", "slice_grad_norm"))


def test_a_bug_on_one_rank_ends_the_run_at_once_with_its_traceback(setup, tmp_path):
    """The failing rank must not wait in a clean-up for others that wait for it in a collective."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import titan_hd.models.head as head\n"
        "    def broken(*_):\n"
        "        raise RuntimeError('a bug of rank 1')\n"
        "    head.logits_or_loss = broken\n"
    )
    start = time.monotonic()
    result = run_train(*setup(), PYTHONPATH=str(tmp_path / "hook"))
    assert result.returncode == 1
    assert "RuntimeError: a bug of rank 1" in result.stderr
    assert "worker 1 ended with status 1: " in result.stderr
    assert time.monotonic() - start < 60


def test_the_plan_of_an_8b_run_needs_neither_weights_nor_data():
    """The command of the README."""
    arguments = ["--config", "train_configs/llama31_8b_hdpissa.toml", "--job.print_plan"]
    result = subprocess.run(
        [REPOSITORY / "run_train.sh", *arguments, "--model.hf_assets_path", "", "--model.flavor", "8B"],
        env={**CPU_ONLY, "NGPU": "8"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "total 0.635 GB; all dense would be 38.5 times that" in result.stdout


def test_workers_must_be_a_number(setup):
    result = run_train(*setup(), NGPU="many")
    assert result.returncode == 2
    assert "NGPU: must be a whole number" in result.stderr
