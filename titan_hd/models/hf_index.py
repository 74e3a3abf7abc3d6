"""Which safetensors files a HF directory has. It is untrusted: no path leads out of it, nothing pickled is read."""

from __future__ import annotations

from pathlib import Path

from titan_hd.errors import UserError
from titan_hd.files import read_json_object, shown
from titan_hd.models.safetensors_header import unique_keys

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def find_files(directory: Path) -> dict[str, str] | None:
    """The index of a HF directory, tensor -> file in this directory, or None for a single model.safetensors.

    Raises:
        UserError: there are no safetensors, an index is broken or leads out of the directory; all faults at once.
    """
    if not directory.is_dir():
        raise UserError(f"model.hf_assets_path: {directory} is no directory")
    single, index = directory / SINGLE, directory / INDEX
    if not index.exists():
        if not single.exists():
            raise UserError(_what_else(directory))
        return None
    weight_map = read_json_object(index, unique_keys).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()) or not weight_map:
        raise UserError(f"{index}: weight_map: must be an object of file names")
    files = sorted(set(weight_map.values()))
    errors = [f"{index}: weight_map: {reason}" for file in files if (reason := _refusal(file))]
    if single.exists() and SINGLE not in files:
        errors.append(f"{directory}: holds both {SINGLE} and an index of other files; remove the one that is stale")
    if errors:
        raise UserError("\n".join(errors))
    return weight_map


def _refusal(file: str) -> str | None:
    """Why an index may not name a file, or None. A file of the directory may be a link, as in the hub's cache."""
    if Path(file).name != file or "\0" in file:
        return f"{shown(repr(file))} is not a file of the directory"
    if file.endswith(_PICKLES):
        return f"{shown(file)} is pickled, which can run code when it is read; convert it to safetensors"
    if not file.endswith(".safetensors"):
        return f"{shown(repr(file))} is no safetensors file"
    return None


def _what_else(directory: Path) -> str:
    pickles = [path.name for path in directory.iterdir() if path.name.endswith(_PICKLES)]
    if pickles:
        return (
            f"model.hf_assets_path: {directory / min(pickles)} is pickled, which can run code when it is read; convert "
            "the weights to safetensors"
        )
    return f"model.hf_assets_path: {directory} holds no {SINGLE} and no index of it"
