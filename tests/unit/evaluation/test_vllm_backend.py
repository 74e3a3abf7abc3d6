"""The vllm backend: what it asks of vllm's documented interface, and vllm itself where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from titan_hd.components.generation import Sampling
from titan_hd.errors import UserError
from titan_hd.evaluation.backends import Request
from titan_hd.evaluation.vllm_backend import VllmBackend


class StandIn(ModuleType):
    """As much of vllm as is used. Every prompt is continued by its own last token plus 1, 2, 3, ..."""

    def __init__(self):
        super().__init__("vllm")
        self.made, self.asked = [], []
        outer = self

        class LLM:
            def __init__(self, model, **settings):
                if "broken" in model:
                    raise ValueError("no such\narchitecture")
                outer.made.append((model, settings))

            def generate(self, prompts, sampling_params, use_tqdm=True):
                outer.asked.append(sampling_params)
                rows = [[prompt["prompt_token_ids"][-1] + n for n in range(1, 6)] for prompt in prompts]
                return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row))]) for row in rows]

            def beam_search(self, prompts, params):
                outer.asked.append(params)
                rows = [[*prompt["prompt_token_ids"], 7, 8, 9] for prompt in prompts]  # with the prompt, as vllm's
                return [SimpleNamespace(sequences=[SimpleNamespace(tokens=row)]) for row in rows]

        self.LLM, self.SamplingParams = LLM, dict
        self.sampling_params = ModuleType("vllm.sampling_params")
        self.sampling_params.BeamSearchParams = dict


@pytest.fixture
def vllm(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", stand_in.sampling_params)
    return stand_in


def directory(tmp_path: Path, name: str = "model") -> Path:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    return tmp_path / name


def test_greedy_and_beams(vllm: StandIn, tmp_path: Path):
    backend = VllmBackend(directory(tmp_path), torch.bfloat16, 4, ["###"])
    ((model, settings),) = vllm.made
    assert model == str(tmp_path / "model")
    assert (settings["dtype"], settings["tensor_parallel_size"], settings["generation_config"]) == (
        "bfloat16",
        4,
        "vllm",
    )
    assert backend.generate([[1, 10], [20]], Request({13}, 9)) == [[11, 12], [21, 22, 23, 24, 25]]
    (params,) = vllm.asked
    assert len(params) == 2
    assert params[0] == {
        "temperature": 0.0, "top_p": 1.0, "top_k": -1, "seed": None, "max_tokens": 9, "stop_token_ids": [13],
        "stop": ["###"], "skip_special_tokens": False,
    }  # fmt: skip
    assert backend.generate([[1, 10], [20]], Request({9}, 32, 4)) == [[7, 8]] * 2
    assert vllm.asked[-1] == {"beam_width": 4, "max_tokens": 32}


def test_each_sample_has_its_own_seed(vllm: StandIn, tmp_path: Path):
    backend = VllmBackend(directory(tmp_path), None, 1, [])
    assert vllm.made[0][1]["dtype"] == "auto"
    keys = ["gsm8k/0/0", "gsm8k/0/1"]
    for order in (keys, keys[::-1]):
        backend.generate([[1]] * 2, Request((), 3, sampling=Sampling(0.7, 5, 0.9, 3), keys=order))
    first, second = (
        {key: params["seed"] for key, params in zip(order, asked)}
        for order, asked in zip((keys, keys[::-1]), vllm.asked)
    )
    assert first == second
    assert len(set(first.values())) == 2
    assert all(0 <= seed < 2**63 for seed in first.values())
    assert (vllm.asked[0][0]["temperature"], vllm.asked[0][0]["top_k"], vllm.asked[0][0]["stop"]) == (0.7, 5, None)


def test_what_cannot_be_loaded_is_one_line(vllm: StandIn, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"broken: vllm cannot load it: no such architecture"):
        VllmBackend(directory(tmp_path, "broken"), None, 1, [])
    with pytest.raises(UserError, match=r"vllm reads HF directories; .* has no config.json"):
        VllmBackend(tmp_path / "none", None, 1, [])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"--backend: vllm is not installed: pip install vllm, or"):
        VllmBackend(directory(tmp_path), None, 1, [])


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_itself(shared_data: Path):
    """Greedily, a real model tells the same story as natively."""
    from titan_hd.checkpoint.pretrained import load_pretrained
    from titan_hd.evaluation.backends import NativeBackend

    folder, device = shared_data / "stories260k-hf", torch.device("cuda")
    model, _ = load_pretrained(folder, "", torch.float32, device)
    asked = ([[1], [1, 403, 407]], Request([2], 24))
    theirs = VllmBackend(folder, torch.float32, 1, []).generate(*asked)
    assert theirs == NativeBackend(model, device).generate(*asked)
