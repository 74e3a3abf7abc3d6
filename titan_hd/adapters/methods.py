"""Which method a configuration names, and how it is built: one line for each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from titan_hd.adapters.adapter_linear import AdapterMethod
from titan_hd.adapters.bat import BatLinear
from titan_hd.adapters.bone import BoneLinear
from titan_hd.adapters.dora import DoRALinear
from titan_hd.adapters.full import FullFineTuning
from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.adapters.hira import HiraLinear
from titan_hd.adapters.lora import LoRALinear, lora_scale
from titan_hd.adapters.mora import MoraLinear
from titan_hd.adapters.olora import OLoRALinear
from titan_hd.adapters.pissa import PiSSALinear
from titan_hd.adapters.protocol import Method
from titan_hd.adapters.svd import SvdSettings
from titan_hd.config.job_config import Adapter, JobConfig


def build_method(config: JobConfig, num_adapters: int = 1) -> Method:
    """The method that adapter.method names. num_adapters: K, for hdpissa alone."""
    return _BUILDERS[config.adapter.method](config, num_adapters)


def adapter_identity(config: Adapter) -> dict[str, object]:
    """What a run with adapters beside W and the checkpoint that it resumes from must have in common."""
    alpha = config.rank if config.alpha is None else config.alpha
    keys = ("rank", "dropout", "rslora", "init", "mora_type", "bat_form")
    return {"adapter.alpha": alpha, **{f"adapter.{key}": getattr(config, key) for key in keys}}


def _hdpissa(config: JobConfig, num_adapters: int) -> Method:
    a, h = config.adapter, config.hdpissa
    return HDPissa(num_adapters, a.rank, a.alpha, a.dropout, h.mute_scalar, h.slices)


def _lora(config: JobConfig, num_adapters: int) -> Method:
    settings, lr_ratios = _lora_settings(config), _lora_lr_ratios(config)
    if config.adapter.init == "olora":
        return AdapterMethod(OLoRALinear, {**settings, "dtype": _gathered_dtype(config)}, lr_ratios)
    return AdapterMethod(LoRALinear, settings, lr_ratios)


def _pissa(config: JobConfig, num_adapters: int) -> Method:
    a = config.adapter
    svd = {"svd": SvdSettings(a.svd, a.svd_niter), "svd_cache": a.svd_cache, "dtype": _gathered_dtype(config)}
    return AdapterMethod(PiSSALinear, {**_lora_settings(config), **svd}, _lora_lr_ratios(config))


def _dora(config: JobConfig, num_adapters: int) -> Method:
    return AdapterMethod(DoRALinear, _lora_settings(config), _lora_lr_ratios(config))


def _lora_settings(config: JobConfig) -> dict[str, object]:
    a = config.adapter
    return {"rank": a.rank, "scale": lora_scale(a.rank, a.alpha, a.rslora), "dropout": a.dropout}


def _lora_lr_ratios(config: JobConfig) -> dict[str, float]:
    ratio = config.adapter.loraplus_lr_ratio
    return {} if ratio == 1.0 else {"lora_B": ratio}


def _gathered_dtype(config: JobConfig) -> torch.dtype:
    return getattr(torch, config.training.mixed_precision_param)


def _mora(config: JobConfig, num_adapters: int) -> Method:
    a = config.adapter
    return AdapterMethod(MoraLinear, {"rank": a.rank, "mora_type": a.mora_type, "dropout": a.dropout})


def _hira(config: JobConfig, num_adapters: int) -> Method:
    return AdapterMethod(HiraLinear, {"rank": config.adapter.rank, "dropout": config.adapter.dropout})


def _bone(config: JobConfig, num_adapters: int) -> Method:
    return AdapterMethod(BoneLinear, {"block": config.adapter.rank, "dropout": config.adapter.dropout})


def _bat(config: JobConfig, num_adapters: int) -> Method:
    a = config.adapter
    return AdapterMethod(BatLinear, {"block": a.rank, "form": a.bat_form, "dropout": a.dropout})


_BUILDERS: dict[str, Callable[[JobConfig, int], Method]] = {
    "hdpissa": _hdpissa,
    "full": lambda config, num_adapters: FullFineTuning(),
    "lora": _lora,
    "pissa": _pissa,
    "dora": _dora,
    "mora": _mora,
    "hira": _hira,
    "bone": _bone,
    "bat": _bat,
}
