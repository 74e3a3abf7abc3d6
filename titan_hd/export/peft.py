"""Writes the adapters alone, as a directory that the peft library loads onto the base model.

Every rank makes the tensors of the layers dealt to it (`distributed.regroup`), and rank 0 gathers them, wave by wave,
and writes one file. They are fp32: an adapter is small, and the two halves of a PiSSA adapter nearly cancel, which
rounding would undo.

PiSSA and OLoRA train A, B over a base weight W - s B0 A0, while peft's user has W. So the adapter is of rank 2r:
s B A - s B0 A0. A0 and B0 are kept nowhere: s B0 A0 is the base model's weight minus the frozen one, a matrix of rank
r, whose decomposition is as good as the first values themselves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from titan_hd import __version__
from titan_hd.adapters.adapter_linear import AdapterLinear, adapter_layers
from titan_hd.adapters.dora import DoRALinear
from titan_hd.adapters.lora import LoRALinear
from titan_hd.adapters.methods import method_of
from titan_hd.adapters.svd import SvdSettings, principal_factors
from titan_hd.config.job_config import JobConfig
from titan_hd.console import Progress
from titan_hd.data.build import NO_ANSWERS, Answering
from titan_hd.distributed.adapter_init import collect_tensors
from titan_hd.distributed.collectives import gather_on_rank_zero, raise_on_all
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.regroup import collect, sharded, waves
from titan_hd.errors import UserError
from titan_hd.export.hf import beside, check_folder, export_folder, publish, start_folder, write_answering
from titan_hd.export.model_card import base_name
from titan_hd.files import disk_faults
from titan_hd.models.hf_files import WeightFiles, open_model_weights
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig

logger = logging.getLogger("titan_hd")

# Our names of tensors -> peft's, where they differ.
_PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_MAGNITUDE = "lora_magnitude_delta"  # of DoRA; peft keeps m, ours is m - ||W||


def export_peft(model: Model, dims: ParallelDims, config: JobConfig, answering: Answering = NO_ANSWERS) -> None:
    """Write the adapters to export.folder: adapter_config.json and adapter_model.safetensors. Collective.

    answering: of the training records; what the base model lacks of it is written, too, for whoever generates.

    Raises:
        UserError: the folder holds something else, the disk fails, or the base model's files are needed and are not as
            they were; on every rank.
    """
    folder, assets = export_folder(config), config.model.hf_assets_path
    partial, tensors = beside(folder), {}
    with raise_on_all("looking at the export folder"):
        check_folder(folder, assets)
        base = _base_files(model, assets)
    layers = len(adapter_layers(model))
    with Progress("collecting the adapters", layers, "layers", shown=dims.rank == 0) as progress:
        for wave in _adapter_waves(model, dims, base):
            tensors |= wave
            progress.update(min(dims.world_size, layers - progress.done))
        for wave in _head_waves(model, dims):
            tensors |= wave
    with raise_on_all("writing the adapter"), disk_faults(partial):
        if dims.rank == 0:
            start_folder(partial)
            about = adapter_config(config, base_name(model.config.hf, assets), adapter_layers(model), model.config)
            (partial / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            if write_answering(partial, Path(assets), model.config.hf, answering):
                logger.warning(
                    "the base model lacks what the training took for granted: generate with the "
                    "generation_config.json and chat_template.jinja that lie beside the adapter"
                )
            path = partial / "adapter_model.safetensors"
            try:
                save_file(tensors, path, {"format": "pt", "titan_hd": __version__})
            except SafetensorError as error:  # of a full disk, too, which is no OSError here
                raise UserError(f"{path}: cannot be written: {error}") from None
            publish(partial, folder)
            logger.info("exported the adapter (%d tensors, float32) to %s", len(tensors), folder)


def _base_files(model: Model, assets: str) -> WeightFiles | None:
    """The base model's weights, if a method has changed them."""
    layers = adapter_layers(model)
    if not any(layer.changes_weight for layer in layers.values()):
        return None
    return open_model_weights(assets, model.config)


@torch.no_grad()
def _adapter_waves(model: Model, dims: ParallelDims, base: WeightFiles | None) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors by peft's names, on the host, wave by wave; all of them on rank 0, nothing on the others."""
    layers = adapter_layers(model)
    needs_weight = any(layer.changes_weight or _MAGNITUDE in layer.adapter_names for layer in layers.values())
    for names in waves(list(layers), dims):
        wave = [layers[name] for name in names]
        weight = collect([sharded(layer.weight) for layer in wave], dims) if needs_weight else None
        tensors = collect_tensors(wave, dims)
        mine: dict[str, torch.Tensor] = {}
        with raise_on_all("reading the base model"):
            if dims.rank < len(wave):
                layer, name = wave[dims.rank], names[dims.rank]
                frozen = None if weight is None else weight.float()
                taken_out = None
                if layer.changes_weight:
                    assert base is not None
                    assert frozen is not None
                    taken_out = _base_weight(base, name, frozen) - frozen
                for key, value in peft_tensors(layer, tensors, frozen, taken_out).items():
                    mine[f"base_model.model.{name}.{key}"] = value.cpu().contiguous()
        yield {key: value for part in gather_on_rank_zero(mine or None) for key, value in part.items()}


@torch.no_grad()
def _head_waves(model: Model, dims: ParallelDims) -> Iterator[dict[str, torch.Tensor]]:
    """As `_adapter_waves`, of a head that is trained beside any method: peft keeps it whole (`modules_to_save`)."""
    head = model.trained_head()
    of_head = set() if head is None else {*head.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p in of_head}
    for names in waves(list(trained), dims):
        whole = collect([sharded(trained[name]) for name in names], dims)
        mine = None if whole is None else {f"base_model.model.{names[dims.rank]}": whole.float().cpu().contiguous()}
        yield {key: value for part in gather_on_rank_zero(mine) for key, value in part.items()}


def _base_weight(base: WeightFiles, name: str, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like)
    base.read_into(f"{name}.weight", out)
    return out


def peft_tensors(
    layer: AdapterLinear,
    tensors: dict[str, torch.Tensor],
    weight: torch.Tensor | None = None,
    taken_out: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What peft keeps of a layer, by its names within the layer.

    weight: the frozen weight [out, in] (DoRA). taken_out: what the method took out of the base model's weight.
    """
    if taken_out is not None:
        assert isinstance(layer, LoRALinear)
        a0, b0 = principal_factors(taken_out, layer.rank, SvdSettings())
        a, b = tensors["lora_A"], tensors["lora_B"]
        tensors = {"lora_A": torch.cat([a, a0]), "lora_B": torch.cat([layer.scale * b, -b0], 1)}
    elif _MAGNITUDE in tensors:
        assert isinstance(layer, DoRALinear)
        assert weight is not None
        magnitude = layer.magnitude(weight, tensors[_MAGNITUDE])
        tensors = {key: t for key, t in tensors.items() if key != _MAGNITUDE} | {"lora_magnitude_vector": magnitude}
    return {_PEFT_NAMES.get(key, key): value for key, value in tensors.items()}


def adapter_config(config: JobConfig, base: str, layers: Iterable[str], model: ModelConfig) -> dict[str, Any]:
    """adapter_config.json of the run's method. base: the name of the base model; layers: of those that are adapted."""
    kinds = model.linear_layers()
    targets, task = config.adapter.target_modules, "CAUSAL_LM"
    if model.num_labels:
        # By their kinds: of a head that is kept whole peft would adapt what a shorter name means, too.
        targets, task = None, "SEQ_CLS"
    return {
        **method_of(config).peft_config(config.adapter),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": targets or list(dict.fromkeys(kinds[name] for name in layers)),
        "task_type": task,
        **({"modules_to_save": ["classifier"]} if model.num_labels else {}),
    }
