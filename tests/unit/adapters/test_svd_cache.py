"""Factors kept between runs: the same bits as computed, never those of another weight, and never a reason to stop."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from titan_hd.adapters.svd import SvdSettings, principal_factors
from titan_hd.adapters.svd_cache import cache_key, cached_factors

EXACT = SvdSettings("exact")


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(12, 10, generator=torch.Generator().manual_seed(seed))


def factors(folder: Path | str, w: torch.Tensor | None = None, count: int = 4, settings: SvdSettings = EXACT):
    return cached_factors(weight() if w is None else w, count, settings, "model.layers.0.q_proj", str(folder))


def assert_same(found, expected) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("settings", [EXACT, SvdSettings("randomized", 2)])
def test_the_second_time_they_are_read(tmp_path: Path, settings: SvdSettings):
    first = factors(tmp_path / "cache", settings=settings)
    second = factors(tmp_path / "cache", settings=settings)
    assert (first[2]["cached"], second[2]["cached"]) == (False, True)
    assert_same(first, second)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no half-written file is left


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, report = factors("")
    assert_same((a, b), principal_factors(weight(), 4))
    assert report["cached"] is False
    assert not list(tmp_path.iterdir())


def test_the_report(tmp_path: Path):
    _, _, report = factors(tmp_path)
    assert report["layer"] == "model.layers.0.q_proj"
    assert (report["shape"], report["algorithm"]) == ([12, 10], "exact")
    assert 0 < report["captured_energy"] < 1
    assert report["orthogonality_error"] < 1e-5
    assert {**report, "seconds": 0, "cached": True} == {**factors(tmp_path)[2], "seconds": 0}


def test_the_name_is_all_that_the_factors_depend_on():
    keys = [
        cache_key(weight(), 4, EXACT),
        cache_key(weight(1), 4, EXACT),
        cache_key(weight().reshape(10, 12), 4, EXACT),
        cache_key(weight(), 5, EXACT),
        cache_key(weight(), 4, SvdSettings("randomized", 2)),
        cache_key(weight(), 4, SvdSettings("randomized", 3)),
        cache_key(weight(), 4, SvdSettings("exact", smallest=True)),
    ]
    assert len(set(keys)) == len(keys)
    one_bit = weight()
    one_bit[11, 9] = torch.nextafter(one_bit[11, 9], torch.tensor(9.0))
    assert cache_key(one_bit, 4, EXACT) not in keys
    assert cache_key(weight().clone(), 4, EXACT) == keys[0]
    assert cache_key(weight().T.contiguous().T, 4, EXACT) == keys[0]
    assert cache_key(weight(), 4, SvdSettings("exact", 99)) == keys[0]  # iterations mean nothing to it


def test_auto_reads_what_its_choice_wrote(tmp_path: Path):
    factors(tmp_path, settings=EXACT)
    assert factors(tmp_path, settings=SvdSettings("auto"))[2]["cached"] is True


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_a_broken_file_is_computed_anew(tmp_path: Path, caplog, content: bytes):
    expected = factors(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "titan_hd"):
        found = factors(tmp_path)
    assert found[2]["cached"] is False
    assert_same(found, expected)
    assert str(path) in caplog.text
    assert factors(tmp_path)[2]["cached"] is True


def test_a_file_of_other_shapes_is_computed_anew(tmp_path: Path):
    expected = factors(tmp_path)
    (path,) = tmp_path.iterdir()
    factors(tmp_path, count=3)
    (other,) = set(tmp_path.iterdir()) - {path}
    other.replace(path)
    found = factors(tmp_path)
    assert found[2]["cached"] is False
    assert_same(found, expected)


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "titan_hd"):
        a, b, _ = factors(tmp_path / "file")
    assert_same((a, b), principal_factors(weight(), 4))
    assert "adapter.svd_cache: cannot write" in caplog.text


@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_directions_that_a_weight_does_not_have(algorithm: str):
    """Blocks of zeros (LLaMA Pro), merges of low rank: A and B of these directions are zero, and the report says so."""
    settings = SvdSettings(algorithm, 4)
    *factors_of_zero, report = factors("", torch.zeros(12, 10), settings=settings)
    assert not any(factor.any() for factor in factors_of_zero)
    assert (report["zero_directions"], report["directions"], report["captured_energy"]) == (4, 4, 1.0)
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(12, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    assert factors("", low, settings=settings)[2]["zero_directions"] == 1
    assert factors("", settings=settings)[2]["zero_directions"] == 0
    smallest = SvdSettings(algorithm, smallest=True)
    for whole, missing in ((low, 7), (weight(), 0)):  # of 10; W has no smallest direction but noise
        a, b, report = factors("", whole, 8, smallest)
        assert report["zero_directions"] == missing
        assert not a[:missing].any()
        assert not b[:, :missing].any()
        assert a[missing:].all()
