"""An adapter of the peft library as it lies in a folder, adapter_config.json and its weights, without its model."""

from __future__ import annotations

from pathlib import Path

from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.text.tokenizer_base import Settings, Tokenizer
from titan_hd.errors import UserError
from titan_hd.files import read_json_object

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def is_adapter(directory: Path) -> bool:
    """Whether a directory has an adapter, and no model."""
    return (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file()


def base_model(adapter: Path, assets: str) -> Path:
    """The HF directory of the adapter's model.

    assets: its path; empty: what adapter_config.json has, if that is a path.

    Raises:
        UserError: it is no such directory, or the adapter's weights are not there.
    """
    if not any((adapter / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{adapter}: has adapter_config.json, but neither {' nor '.join(_WEIGHTS)}")
    name = assets or read_json_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(name, str) and name and (Path(name) / "config.json").is_file():
        return Path(name)
    if assets:
        raise UserError(f"--assets: {assets} has no config.json: must be the HF directory of the adapter's model")
    raise UserError(f"--assets: missing: {adapter} is an adapter of the model {name!r}; name its HF directory")


def load_adapter_tokenizer(adapter: Path, base: Path) -> Tokenizer:
    """The adapter's tokenizer, or else its model's; with the chat template and the stop tokens that lie beside the
    adapter, which are those that it was trained with.

    Raises:
        UserError: a file cannot be read.
    """
    if any((adapter / name).is_file() for name in _TOKENIZERS):
        return load_tokenizer(adapter)
    tokenizer = load_tokenizer(base)
    tokenizer.stop_ids |= frozenset(Settings.read(adapter).stop_ids)
    if any((adapter / name).is_file() for name in _CHAT_TEMPLATES):
        tokenizer.directory = adapter
    return tokenizer
