"""Every shipped configuration loads, and those of published models fit these models at their true sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.kit.runs import LINEAR_LAYERS
from titan_hd.adapters.hdpissa import HDPissa, HDPissaLinear
from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.distributed.parallel_dims import placement_error
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import FLAVORS, flavor_config

FOLDER = Path(__file__).resolve().parents[1] / "train_configs"
CONFIGS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.toml"))

# in + out, summed over the seven linear layers of all blocks: what one adapter of rank 1 has on the whole model.
# Times 16 these are the 39,976,960 and 41,943,040 parameters that LoRA of rank 16 is known to have there.
WIDTHS = {
    ("llama2", "7B"): 2498560,
    ("llama3", "8B"): 2621440,
    ("llama3", "70B"): 12943360,
    ("mistral", "7B"): 2621440,
}


def load(name: str) -> JobConfig:
    return manager.load(["--config", str(FOLDER / name)])


def published(name: str) -> tuple[str, str] | None:
    """(family, flavor) of the model that a file's directory names, such as llama2 7B, or None."""
    model = load(name).model
    size = re.search(r"-(\d+b)\b", Path(model.hf_assets_path).name.lower())
    flavor = size[1].upper() if size else ""
    return (model.name, flavor) if flavor in FLAVORS.get(model.name, {}) else None


def hdpissa_on_published() -> list[str]:
    try:
        return [name for name in CONFIGS if published(name) and load(name).adapter.method == "hdpissa"]
    except manager.ConfigError:
        return []  # test_it_loads says which and why


def test_there_are_configurations():
    assert "quickstart.toml" in CONFIGS  # what run_train.sh runs without arguments


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads(name: str):
    """Without the files that it refers to: models and data are downloaded later."""
    config = load(name)
    assert config.job.dump_folder
    assert config.job.description, "job.description says what a recipe is for"


@pytest.mark.parametrize("name", CONFIGS)
def test_resolved_it_says_the_same(name: str, tmp_path: Path):
    path = tmp_path / "resolved.toml"
    path.write_text(manager.to_toml(load(name)), encoding="utf-8")
    assert manager.load(["--config", str(path)]) == load(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_do_not_write_into_each_other(name: str):
    others = [load(other).job.dump_folder for other in CONFIGS if other != name]
    assert load(name).job.dump_folder not in others


@pytest.mark.parametrize("name", hdpissa_on_published())
class TestPublishedModels:
    def test_adapters_fit_the_true_sizes(self, name: str):
        """On the meta device: every layer has enough singular directions, and K * r * (in + out) parameters."""
        config, (family, flavor) = load(name), published(name)
        adapter, k = config.adapter, config.hdpissa.num_adapters or 8
        with torch.device("meta"):
            model = Decoder(flavor_config(family, flavor))
        method = HDPissa(k, adapter.rank, adapter.alpha, adapter.dropout, 0.0, config.hdpissa.slices)
        trained = method.apply(model, adapter.target_modules)
        targets = adapter.target_modules or LINEAR_LAYERS
        assert len(trained) == len(targets) * model.config.num_hidden_layers
        layers = [model.get_submodule(layer) for layer in trained]
        assert all(isinstance(layer, HDPissaLinear) for layer in layers)
        count = sum(k * adapter.rank * (layer.in_features + layer.out_features) for layer in layers)
        shapes = model.config.linear_shapes()
        per_block = sum(k * adapter.rank * sum(shapes[target]) for target in targets)
        assert count == per_block * model.config.num_hidden_layers
        if set(targets) == set(LINEAR_LAYERS):
            assert count == k * adapter.rank * WIDTHS[family, flavor]
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("workers", [1, 2, 4, 8])
    def test_the_global_batch_can_be_dealt(self, name: str, workers: int):
        """On a node of eight, and on fewer workers, where each hosts several adapters."""
        training = load(name).training
        k = load(name).hdpissa.num_adapters or workers
        batch = training.global_batch_size
        if batch == -1:
            batch = training.local_batch_size * max(k, workers)
        assert placement_error(k, workers, batch, training.local_batch_size) is None

    def test_sequences_fit_the_model(self, name: str):
        family, flavor = published(name)
        assert load(name).training.seq_len <= flavor_config(family, flavor).max_position_embeddings
