"""The table of methods: what adapter.method may name. A new method is its file and its name here."""

from __future__ import annotations

from titan_hd.adapters.bat import Bat
from titan_hd.adapters.bone import Bone
from titan_hd.adapters.dora import DoRA
from titan_hd.adapters.full import FullFineTuning
from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.adapters.hira import Hira
from titan_hd.adapters.lora import LoRA
from titan_hd.adapters.method import Method, setting
from titan_hd.adapters.mora import Mora
from titan_hd.adapters.pissa import PiSSA
from titan_hd.config.job_config import JobConfig

_ALL: tuple[type[Method], ...] = (HDPissa, FullFineTuning, LoRA, PiSSA, DoRA, Mora, Hira, Bone, Bat)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
_BY_ANY_NAME = {name: method for method in _ALL for name in (method.name, *method.aliases)}

# Keys that ask for a variant of a method: for a method without it they are an error. What else a method does not read
# may come from a recipe that it inherits, and is warned about.
_VARIANTS = tuple(f"adapter.{key}" for key in ("rslora", "loraplus_lr_ratio", "init", "mora_type", "bat_form"))
_READ_BY_SOME = dict.fromkeys(key for method in _ALL for key in method.keys)
_COMMON = ("adapter.rank", "adapter.dropout")  # of every method but full, which refuses the second


def method_named(name: str) -> type[Method]:
    """The method of a value of adapter.method."""
    return _BY_ANY_NAME[name]


def method_of(config: JobConfig) -> type[Method]:
    """The method that a configuration names."""
    return method_named(config.adapter.method)


def build_method(config: JobConfig, num_adapters: int = 1) -> Method:
    """The method that a configuration names, with its settings. num_adapters: K."""
    return method_of(config).from_config(config, num_adapters)


def method_errors(config: JobConfig) -> list[str]:
    """Faults of a configuration that depend on the method and need no shapes, one line each."""
    method, errors = method_of(config), []
    for key in _VARIANTS:
        if key not in method.keys and _is_set(config, key):
            having = ", ".join(name for name, other in METHODS.items() if key in other.keys)
            errors.append(f"{key}: is for {having}, not for adapter.method {config.adapter.method}; leave it out")
    dtype = config.training.master_dtype
    if dtype not in ("auto", *method.master_dtypes):
        kinds = "methods that keep W frozen" + (" or fold into it" if dtype == "bfloat16" else "")
        errors.append(
            f"training.master_dtype: {dtype} is for {kinds}, not for {method.name} (small updates would vanish)"
        )
    if config.export.enable and config.export.format == "peft":
        error = method.peft_error(config)
        errors += [error] if error else []
    return errors + method.config_errors(config)


def ignored_keys(config: JobConfig) -> list[str]:
    """Keys that are set and that the method does not use, one line for all of them."""
    inherited = [key for key in _READ_BY_SOME if key not in (*_VARIANTS, *_COMMON)]
    unused = [key for key in inherited if key not in method_of(config).keys and _is_set(config, key)]
    return [f"{', '.join(unused)}: not used by adapter.method {config.adapter.method}"] if unused else []


def _is_set(config: JobConfig, key: str) -> bool:
    return setting(config, key) != setting(JobConfig(), key)
