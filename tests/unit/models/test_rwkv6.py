"""RWKV-6: names and sizes, documents in one row, generation, checkpointing; the `rwkv` package on real weights."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kit.rwkv import TINY, read_rwkv_cpp, write_model
from titan_hd.components.generation import generate
from titan_hd.distributed.parallelize import apply_activation_checkpointing
from titan_hd.errors import UserError
from titan_hd.models.head import Targets
from titan_hd.models.hf_files import WeightFiles
from titan_hd.models.registry import flavor_config, parse_hf_config
from titan_hd.models.rwkv6 import Rwkv6, parse_rwkv6
from tools.convert_rwkv import hf_config, hf_tensors, to_hf, to_pth

FP32 = {"rtol": 1e-5, "atol": 1e-5}  # other orders of the same sums
PACKAGE = 1e-4  # of logits, over twelve blocks


def tiny(**changes) -> Rwkv6:
    """Random weights of which every one matters: shares, decays and bonuses far from their first values."""
    model = Rwkv6(parse_rwkv6({**TINY, **changes}, "tests"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def test_the_seven_billion_have_larger_maps():
    small, large = flavor_config("rwkv6", "3B"), flavor_config("rwkv6", "7B")
    assert (small.time_mix_extra_dim, small.time_decay_extra_dim, small.intermediate_size) == (32, 64, 8960)
    assert (large.time_mix_extra_dim, large.time_decay_extra_dim, large.intermediate_size) == (64, 128, 14336)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_version", "5_2", "model_version: '5_2' is not supported; only 6_0 is"),
        ("tie_word_embeddings", True, "tie_word_embeddings: True is not supported"),
        ("head_size", 7, r"head_size: must divide hidden_size \(24\), not 7"),
        ("attention_hidden_size", 12, r"attention_hidden_size: only hidden_size \(24\) is supported"),
        ("num_hidden_layers", 2000, "num_hidden_layers: must be at most 1000"),
        ("vocab_size", None, "vocab_size: is missing"),
    ],
)
def test_refused_by_name(key: str, value, says: str):
    with pytest.raises(ValueError, match=f"here: {says}"):
        parse_hf_config({**TINY, key: value}, "here")


def test_random_weights_of_a_flavor_have_first_values():
    """Of every parameter that is no matrix: decays and mixtures spread over the channels, norms at 1."""
    model, drawn = tiny(), []
    for name, p in model.named_parameters():
        value = model.initial(name)
        if value is None:
            drawn.append(name.rpartition(".")[2])
        elif isinstance(value, torch.Tensor):
            assert value.shape == p.shape, name
            assert value.isfinite().all()
    assert set(drawn) == {"weight", "time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"}


def test_keys_of_unknown_meaning_are_named():
    published = {"attention_hidden_size": 24, "num_attention_heads": 64, "rescale_every": 6, "auto_map": {"a": "b"}}
    assert parse_hf_config({**TINY, **published}, "x").ignored == ()
    assert parse_hf_config({**TINY, "new_gate": 3}, "x").ignored == ("new_gate",)


def test_documents_of_a_row_are_as_if_alone():
    model, row = tiny(), ids(2, 45)
    documents = torch.zeros(2, 45, dtype=torch.long)
    documents[0, 20:], documents[0, 21:], documents[1, 32:] = 1, 2, 1
    with torch.no_grad():
        packed = model(row, documents=documents)
        for line, start, end in ((0, 0, 20), (0, 20, 21), (0, 21, 45), (1, 0, 32), (1, 32, 45)):
            alone = model(row[line : line + 1, start:end])
            torch.testing.assert_close(packed[line : line + 1, start:end], alone, **FP32)


def test_token_by_token_is_the_whole_row():
    model, row = tiny(), ids(2, 40)
    with torch.no_grad():
        whole = model(row)
        cache = model.new_cache(40)
        parts = [model(row[:, a:b], cache=cache) for a, b in ((0, 33), (33, 34), (34, 35), (35, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **FP32)


def test_prompts_of_unequal_lengths_generate_as_alone():
    model, device = tiny(), torch.device("cpu")
    prompts = [ids(n, seed=n).tolist() for n in (3, 35, 1, 12)]
    together = generate(model, prompts, {0}, 12, device)
    assert together == [generate(model, [prompt], {0}, 12, device)[0] for prompt in prompts]
    assert max(map(len, together)) == 12


@pytest.mark.parametrize(
    ("mode", "keep"), [("full", ()), ("selective", ("qkv", "gate_up")), ("selective", ())], ids=str
)
def test_checkpointing_changes_no_gradient(mode: str, keep: tuple[str, ...]):
    row = ids(2, 37)
    targets = Targets.of(ids(2, 37, seed=2))
    documents = (torch.arange(37) >= 11).long().expand(2, -1)

    def gradients(model: Rwkv6) -> dict[str, torch.Tensor]:
        model(row, documents=documents, targets=targets).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, model = gradients(tiny()), tiny()
    apply_activation_checkpointing(model, mode, keep)
    got = gradients(model)
    assert wanted.keys() == got.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, torch.Tensor]:
    """Weights in BlinkDL's names."""
    return read_rwkv_cpp(shared_data / "rwkv_tiny" / "tiny-rwkv-6v0-1m-FP32.bin")


@pytest.fixture(scope="module")
def model(real: dict[str, torch.Tensor]) -> Rwkv6:
    """The same weights, here."""
    config = parse_rwkv6(hf_config(real, "tests"), "tests")
    model = Rwkv6(config)
    model.load_state_dict(hf_tensors(real, config, "tests"))
    return model.eval()


@pytest.fixture(scope="module")
def package(real: dict[str, torch.Tensor], tmp_path_factory):
    """The same weights in the `rwkv` package."""
    os.environ["RWKV_V7_ON"], os.environ["RWKV_JIT_ON"], os.environ["RWKV_CUDA_ON"] = "0", "0", "0"
    rwkv = pytest.importorskip("rwkv.model", reason="the rwkv package is not installed")
    path = tmp_path_factory.mktemp("rwkv") / "tiny.pth"
    torch.save(real, path)
    return rwkv.RWKV(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)


TEXT = b"In the beginning was the Word, and the Word was with God. 1234567890 + 1 = "


def test_logits_are_the_packages(model: Rwkv6, package):
    with torch.no_grad():
        ours = model(torch.tensor([list(TEXT)]))[0]
    theirs, _ = package.forward(list(TEXT), None, full_output=True)
    assert ours.std() > 0.5  # a model that says something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=PACKAGE)


def test_greedy_text_is_the_packages(model: Rwkv6, package):
    ours = generate(model, [list(TEXT)], set(), 40, torch.device("cpu"))[0]
    theirs, state = [], None
    logits, state = package.forward(list(TEXT), None)
    for _ in range(40):
        theirs.append(int(logits.argmax()))
        logits, state = package.forward([theirs[-1]], state)
    assert ours == theirs


def test_a_pth_and_back(real: dict[str, torch.Tensor], tmp_path: Path):
    """Bit for bit; and the directory in between is one that the registry reads."""
    torch.save(real, tmp_path / "model.pth")
    to_hf(tmp_path / "model.pth", tmp_path / "hf", None, None, 1e6)
    to_pth(str(tmp_path / "hf"), tmp_path / "again.pth", None)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == real.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in real.items())
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    with pytest.raises(UserError, match=r"hf: is there already"):  # whatever else lies in it would go
        to_hf(tmp_path / "model.pth", tmp_path / "hf", None, None, 1e6)
    with pytest.raises(UserError, match=r"again.pth: is there already"):
        to_pth(str(tmp_path / "hf"), tmp_path / "again.pth", None)


def test_a_pth_that_cannot_be_written(tmp_path: Path, monkeypatch):
    """A folder that is not there is made; for want of room nothing is read; a disk that fills up is one line."""
    write_model(tmp_path / "hf")
    out = tmp_path / "new" / "folder" / "model.pth"
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        m.setattr(WeightFiles, "read_into", None)
        with pytest.raises(UserError, match=r"new/folder: the weights need \S+ kB, 1.00 kB are free"):
            to_pth(str(tmp_path / "hf"), out, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with pytest.raises(UserError, match=r"model.pth: cannot be written: File too large"):
            to_pth(str(tmp_path / "hf"), out, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.parent.iterdir())
    to_pth(str(tmp_path / "hf"), out, None)
    assert out.is_file()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pth_that_is_none_is_refused(real: dict[str, torch.Tensor], tmp_path: Path, monkeypatch):
    """By one line each, and nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    without = {name: t for name, t in real.items() if name != "blocks.3.att.gate.weight"}
    faults = {
        "code": ({**real, "emb.weight": Harmful()}, "is no .pth file of weights alone"),
        "list": ([1, 2], "must hold weights by their names"),
        "other": ({"emb.weight": real["emb.weight"]}, "blocks.0.att.time_maa_w1: is missing, or no matrix"),
        "lacks": (without, "blocks.3.att.gate.weight: is missing"),
        "more": ({**real, "blocks.0.att.time_state": real["emb.weight"]}, "time_state: is not part of the model"),
        "shape": ({**real, "head.weight": real["head.weight"].T}, r"head.weight: has shape \[64, 256\], must be"),
    }
    for name, (content, says) in faults.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=says):
            to_hf(tmp_path / f"{name}.pth", tmp_path / "hf", None, None, 5e9)
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(UserError, match=r"text.pth: is no .pth file"):
        to_hf(tmp_path / "text.pth", tmp_path / "hf", None, None, 5e9)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "hf").exists()
