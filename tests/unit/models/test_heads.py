"""Which head a model has is what transformers decides; what no training could survive is named when it is read."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.kit import runs
from titan_hd.checkpoint.pretrained import load_pretrained
from titan_hd.errors import UserError
from titan_hd.models.hf_files import open_model_weights, read_model_config
from titan_hd.models.registry import read_hf_config

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Logits of one fp32 model of two layers, as in test_decoder.py.
LOGIT_TOLERANCE = 1e-5


def tied_model(folder: Path, **extra: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A model whose config.json ties the head, with some tensors more or (None) less."""
    _, weights = runs.write_model(folder, hidden_size=24, tie_word_embeddings=True)
    weights = {name: w for name, w in {**weights, **extra}.items() if w is not None}
    save_file(weights, folder / "model.safetensors")
    return weights


def write_index(folder: Path, names: list[str]) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def another_head() -> torch.Tensor:
    return torch.randn(50, 24, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "case", ["differs", "differs in one value", "the same", "in another dtype", "alone", "indexed"]
)
def test_the_head_is_that_of_transformers(case: str, tmp_path: Path, caplog):
    transformers = pytest.importorskip("transformers")
    weights = tied_model(tmp_path)
    embedding = weights[EMBEDDING]
    if case == "differs":
        tied_model(tmp_path, **{HEAD: another_head()})
    elif case == "differs in one value":
        head = embedding.clone()
        head[-1, -1] += 1
        tied_model(tmp_path, **{HEAD: head})
    elif case == "the same":
        tied_model(tmp_path, **{HEAD: embedding.clone()})
    elif case == "in another dtype":
        tied_model(tmp_path, **{EMBEDDING: embedding.bfloat16(), HEAD: embedding.bfloat16().float()})
    elif case == "alone":
        tied_model(tmp_path, **{EMBEDDING: None, HEAD: embedding})
    else:
        write_index(tmp_path, [*weights, HEAD])
    with caplog.at_level(logging.WARNING, "titan_hd"):
        ours, _ = load_pretrained(tmp_path, "", torch.float32, torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=LOGIT_TOLERANCE)
    assert (ours.lm_head is None) != case.startswith("differs")
    assert ours.config.hf["tie_word_embeddings"] == ours.config.tie_word_embeddings
    assert ("lm_head.weight is not the embedding" in caplog.text) == case.startswith("differs")


def test_an_index_that_names_the_head_alone(tmp_path: Path):
    """The embedding is then the head's matrix, and the index need not name it."""
    weights = tied_model(tmp_path)
    names = [HEAD if name == EMBEDDING else name for name in weights]
    tied_model(tmp_path, **{EMBEDDING: None, HEAD: weights[EMBEDDING]})
    write_index(tmp_path, names)
    files = open_model_weights(tmp_path, read_model_config(tmp_path))
    assert torch.equal(files.read_rows(EMBEDDING, 0, 50), weights[EMBEDDING])


def test_a_tied_model_without_its_matrix(tmp_path: Path):
    tied_model(tmp_path, **{EMBEDDING: None})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight: is missing"):
        open_model_weights(tmp_path, read_model_config(tmp_path))


def test_a_directory_without_weights_has_the_head_of_its_config(tmp_path: Path):
    tied_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_model_config(tmp_path) == read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("value", "stored", "wanted"),
    [
        (float("nan"), torch.float32, torch.float32),
        (float("nan"), torch.bfloat16, torch.float32),
        (float("-inf"), torch.float16, torch.float32),  # an overflow
        (1e300, torch.float64, torch.float32),
        (3.4e38, torch.float32, torch.bfloat16),  # is finite, and rounds to infinity
        (70000.0, torch.float32, torch.float16),
    ],
)
def test_a_value_that_is_no_number_is_named(value: float, stored: torch.dtype, wanted: torch.dtype, tmp_path: Path):
    _, weights = runs.write_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(stored)
    weights[name][3, 5] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path, "", wanted, torch.device("cpu"))
    reason = f"too large for {wanted}" if math.isfinite(value) else "NaN or infinite"
    assert str(caught.value) == f"{tmp_path}/model.safetensors: {name}: holds a value that is {reason}"
    files = open_model_weights(tmp_path, read_hf_config(tmp_path))
    files.read_into(name, torch.empty(3, 22, dtype=wanted))  # another worker's rows
    assert files.nonzero == {name}


def test_weights_of_zeros_are_told(tmp_path: Path):
    _, weights = runs.write_model(tmp_path)
    zero, negative = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    save_file(
        {**weights, zero: -0.0 * weights[zero].abs(), negative: -weights[negative]}, tmp_path / "model.safetensors"
    )
    files = open_model_weights(tmp_path, read_hf_config(tmp_path))
    for name in (zero, negative):
        files.read_into(name, torch.empty(weights[name].shape))
    assert files.nonzero == {negative}
