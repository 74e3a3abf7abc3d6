"""lm-evaluation-harness on an export: its likelihoods of a local task are those of our decoder.

It needs the extra `eval` and a minute: pytest -m slow tests/integration/test_lm_eval.py
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kit.commands import CPU_ONLY, run_train
from titan_hd.checkpoint.pretrained import load_pretrained
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.evaluation.likelihood import encode_pair, log_likelihoods

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # fp32 on both sides: sums of up to 20 terms, by two implementations in other batches

CHOICES = """\
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: RECORDS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ENDINGS = """\
task: local_endings
dataset_path: json
dataset_kwargs: {data_files: {test: RECORDS}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""
RECORDS = [
    {"question": "Once upon a time, there was a little girl named", "choices": ["Lily", "Tractor", "the"], "answer": 0},
    {"question": "Tom went to the park. He saw a big", "choices": ["tree", "dog in the garden", "and"], "answer": 1},
    {"question": "The cat was very happy", "choices": [". The end", "because it had a new ball."], "answer": 1},
    {"question": "One day", "choices": [", a boy", "he", "they went to the store to buy some food"], "answer": 0},
]


@pytest.fixture(scope="module", params=["stories", "export"])
def model(request, shared_data: Path, tmp_path_factory) -> Path:
    """A published model, and what a run of two steps exports."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install titan_hd[eval]")
    stories = shared_data / "stories260k-hf"
    if request.param == "stories":
        return stories
    folder = tmp_path_factory.mktemp("lm_eval")
    records = folder / "records.jsonl"
    records.write_text('{"instruction": "Who?", "output": "Lily."}\n{"instruction": "What?", "output": "A ball."}\n')
    options = {
        "model.hf_assets_path": stories, "data.train": records, "job.dump_folder": folder / "run",
        "training.steps": 2, "training.global_batch_size": 2, "optimizer.lr": 1e-3, "adapter.method": "lora",
        "training.mixed_precision_param": "float32", "adapter.rank": 4, "export.enable": "true",
        "export.dtype": "float32",
    }  # fmt: skip
    result = run_train(*(str(word) for key, value in options.items() for word in (f"--{key}", value)), workers=1)
    assert result.returncode == 0, result.stderr
    return folder / "run" / "hf"


def test_likelihoods_are_those_of_our_decoder(model: Path, tmp_path: Path):
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    for name, text in (("choices", CHOICES), ("endings", ENDINGS)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("RECORDS", str(records)))
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "local_choices,local_endings"),
        *("--model_args", f"pretrained={model},dtype=float32", "--include_path", str(tmp_path), "--device", "cpu"),
        *("--batch_size", "3", "--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    offline = {**CPU_ONLY, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]

    decoder, assets = load_pretrained(model, "", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(assets)
    compared = 0
    for path in (tmp_path / "out").rglob("samples_*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            texts = [(argument["arg_0"], argument["arg_1"]) for argument in sample["arguments"].values()]
            pairs = [encode_pair(tokenizer, *text) for text in texts]
            ours = log_likelihoods(decoder, pairs, torch.device("cpu"))
            assert len(ours) == len(sample["filtered_resps"])
            for likelihood, (total, greedy) in zip(ours, sample["filtered_resps"]):
                assert likelihood.log_probability == pytest.approx(float(total), abs=TOLERANCE)
                assert likelihood.is_greedy == (str(greedy) == "True")
            compared += len(ours)
            if "choices" in path.name:  # what the harness concludes from them
                best = max(range(len(ours)), key=lambda choice: ours[choice].log_probability)
                assert sample["acc"] == (best == sample["doc"]["answer"])
    assert compared == 11 + 4
