"""The supported architectures: how a config.json becomes a configuration, and a configuration a model.

An architecture that differs from another in its data alone is a line of `decoder_config.ARCHITECTURES`. One that
computes something else is a file of its own, with a `ModelConfig` and a `Model`, and a line of `FAMILIES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_hd.errors import UserError
from titan_hd.files import read_json_object
from titan_hd.models import rwkv6
from titan_hd.models.decoder import Decoder
from titan_hd.models.decoder_config import ARCHITECTURES, parse_decoder
from titan_hd.models.flavors import FLAVORS
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.roberta import Roberta, parse_roberta

logger = logging.getLogger("titan_hd")


@dataclass(frozen=True)
class Family:
    """What stands behind a name in a config.json's `architectures`.

    names: that `model.name` may have for it.
    model_type: stands for it where a config.json does not name its architecture.
    parse: (config.json with both of its names, where it is from) -> the model's configuration. It refuses by name what
        the model would compute wrongly.
    """

    names: tuple[str, ...]
    model_type: str
    parse: Callable[[dict[str, Any], str], ModelConfig]
    model: Callable[[Any], Model]


FAMILIES: dict[str, Family] = {
    **{name: Family(data.families, data.model_type, parse_decoder, Decoder) for name, data in ARCHITECTURES.items()},
    rwkv6.ARCHITECTURE: Family(("rwkv6",), rwkv6.MODEL_TYPE, rwkv6.parse_rwkv6, rwkv6.Rwkv6),
}
# Files of RoBERTa's other heads hold the same encoder; the classification head is then a new one.
FAMILIES |= {
    name: Family(("roberta",), "roberta", parse_roberta, Roberta)
    for name in ("RobertaForSequenceClassification", "RobertaForMaskedLM", "RobertaModel")
}


def flavor_config(name: str, flavor: str) -> ModelConfig:
    """Published sizes of a family's flavor. UserError if either is unknown."""
    if name not in FLAVORS:
        raise UserError(f"model.name: must be one of {', '.join(FLAVORS)}, not {name!r}")
    if flavor not in FLAVORS[name]:
        raise UserError(f"model.flavor: must be one of {', '.join(FLAVORS[name])} for {name}, not {flavor!r}")
    return parse_hf_config(FLAVORS[name][flavor], f"{name} {flavor}")


def read_hf_config(directory: str | Path, name: str = "") -> ModelConfig:
    """Read `config.json` of a HF directory; `name`, if given, must be a family of its architecture.

    Raises:
        UserError: missing or unreadable file, or an architecture or feature that is not supported, by name.
    """
    path = Path(directory) / "config.json"
    if not path.exists():
        raise UserError(f"model.hf_assets_path: cannot read {path}: no such file")
    raw = read_json_object(path)
    config = parse_hf_config(raw, str(path))
    if config.ignored:
        logger.warning("%s: ignored keys: %s", path, ", ".join(config.ignored))
    names = FAMILIES[_architecture(raw, str(path))].names
    if name and name not in names:
        raise UserError(f"model.name: {path} is of the family {' or '.join(names)}, not {name!r}")
    return config


def parse_hf_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """Turn the keys of a config.json into a model's configuration; refuse by name what the model would compute wrongly.

    where: the file, or what stands for it, in front of every error.
    """
    name = _architecture(raw, where)
    family = FAMILIES[name]
    named = {**raw, "architectures": [name], "model_type": raw.get("model_type") or family.model_type}
    return family.parse(named, where)


def _architecture(raw: dict[str, Any], where: str) -> str:
    """The architecture that a config.json names, else that of its model_type, by which transformers goes."""
    by_type: dict[str, str] = {}
    for name, family in FAMILIES.items():
        by_type.setdefault(family.model_type, name)
    named = by_type.get(str(raw.get("model_type")))
    names = raw.get("architectures") or ([named] if named else [])
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in FAMILIES:
        raise UserError(f"{where}: architectures: {names} is not supported; supported are {', '.join(FAMILIES)}")
    if named and FAMILIES[names[0]].model_type != raw["model_type"]:  # vLLM goes by the one, transformers by the other
        raise UserError(f"{where}: architectures {names} and model_type {raw['model_type']!r} contradict each other")
    return names[0]


def build_model(config: ModelConfig) -> Model:
    """The model of a configuration, on the device that is the default one."""
    return FAMILIES[config.hf["architectures"][0]].model(config)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every parameter of the model by HF's name, without memory for any."""
    with torch.device("meta"):
        model = build_model(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
