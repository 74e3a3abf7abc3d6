"""Converts RWKV-6 weights between BlinkDL's .pth files and Hugging Face directories.

    python tools/convert_rwkv.py to-hf RWKV-x060-World-3B.pth assets/hf/rwkv6-3B --vocabulary rwkv_vocab_v20230424.txt
    python tools/convert_rwkv.py to-pth outputs/rwkv6_3b_bat/hf RWKV-6-3B-bat.pth

`to-hf` makes a directory that titan_hd trains (config.json, safetensors and the World tokenizer's vocabulary); sizes
are read off the weights. A .pth is a pickle: weights alone are loaded from it, and no code in it is run. `to-pth` makes
the file that the `rwkv` package and RWKV Runner open.
"""

from __future__ import annotations

import functools
import json
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.console import Progress, tell
from titan_hd.data.text.tokenizer_world import VOCABULARY, read_vocabulary
from titan_hd.errors import UserError
from titan_hd.export.hf import beside, publish, start_folder
from titan_hd.files import disk_faults, expand_home, replace_file, user_path
from titan_hd.models.hf_files import (
    check_room,
    check_space,
    open_model_weights,
    plan_files,
    read_model_config,
    sync_files,
    write_headers,
    write_rows,
)
from titan_hd.models.registry import parameter_shapes
from titan_hd.models.rwkv6 import ARCHITECTURE, MIXED, MODEL_TYPE, Rwkv6Config, parse_rwkv6

# BlinkDL's parts of a name -> Hugging Face's.
_NAMES = {"emb.": "rwkv.embeddings.", "ln_out.": "rwkv.ln_out.", "head.": "head."}
_BLOCK_NAMES = {"ln0": "pre_ln", "att": "attention", "ffn": "feed_forward"}


def hf_name(name: str) -> str:
    """Hugging Face's name of a weight that BlinkDL calls `name`."""
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name):
        block, part, rest = match.groups()
        return f"rwkv.blocks.{block}.{_BLOCK_NAMES.get(part, part)}.{rest}"
    return name


def pth_name(name: str) -> str:
    """BlinkDL's name of a weight that Hugging Face calls `name`."""
    for theirs, ours in _NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    _, _, block, part, rest = name.split(".", 4)
    theirs = {ours: theirs for theirs, ours in _BLOCK_NAMES.items()}
    return f"blocks.{block}.{theirs.get(part, part)}.{rest}"


def hf_config(tensors: dict[str, torch.Tensor], where: str) -> dict[str, Any]:
    """The config.json of weights in BlinkDL's names.

    Raises:
        UserError: they are not of an RWKV-6.
    """
    for name in ("emb.weight", *(f"blocks.0.att.{key}" for key in ("time_maa_w1", "time_decay_w1", "time_faaaa"))):
        if name not in tensors or tensors[name].dim() != 2:
            raise UserError(f"{where}: {name}: is missing, or no matrix: the weights are not of an RWKV-6")
    vocabulary, hidden = tensors["emb.weight"].shape
    heads = tensors["blocks.0.att.time_faaaa"].shape[0]
    if hidden % heads:
        raise UserError(f"{where}: blocks.0.att.time_faaaa: {heads} heads do not divide a width of {hidden}")
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "model_version": "6_0",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "attention_hidden_size": hidden,
        "intermediate_size": len(tensors.get("blocks.0.ffn.key.weight", ())) or None,
        "num_hidden_layers": len(blocks),
        "head_size": hidden // heads,
        "head_size_divisor": 8,
        "layer_norm_epsilon": 1e-5,
        "time_mix_extra_dim": tensors["blocks.0.att.time_maa_w1"].shape[1] // len(MIXED),
        "time_decay_extra_dim": tensors["blocks.0.att.time_decay_w1"].shape[1],
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def hf_tensors(tensors: dict[str, torch.Tensor], config: Rwkv6Config, where: str) -> dict[str, torch.Tensor]:
    """Weights in BlinkDL's names by Hugging Face's, in the model's order. Vectors may have lost dimensions of one.

    Raises:
        UserError: one line for each that is missing, of another shape, or not the model's.
    """
    shapes, renamed = parameter_shapes(config), {hf_name(name): tensor for name, tensor in tensors.items()}
    errors = [f"{where}: {pth_name(name)}: is missing" for name in shapes.keys() - renamed.keys()]
    errors += [f"{where}: {name}: is not part of the model" for name in tensors if hf_name(name) not in shapes]
    for name in shapes.keys() & renamed.keys():
        found = renamed[name]
        if [n for n in found.shape if n > 1] != [n for n in shapes[name] if n > 1]:
            line = f"has shape {list(found.shape)}, must be {list(shapes[name])}"
            errors.append(f"{where}: {pth_name(name)}: {line}")
        elif not found.is_floating_point():
            errors.append(f"{where}: {pth_name(name)}: has dtype {found.dtype}, must be a floating one")
    if errors:
        raise UserError("\n".join(sorted(errors)))
    return {name: renamed[name].reshape(shape) for name, shape in shapes.items()}


def load_pth(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a .pth file, mapped and not read yet.

    Raises:
        UserError: it is none, or holds something else than weights.
    """
    try:
        with zipfile.ZipFile(path):  # torch's format since 1.6; of the older ones everything would be unpickled
            pass
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
        raise UserError(f"{path}: is no .pth file of weights alone") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise UserError(f"{path}: must hold weights by their names, and nothing else")
    return loaded


def to_hf(
    source: Path, folder: Path, vocabulary: Path | None, dtype: torch.dtype | None, max_file_bytes: float
) -> None:
    """Write beside `folder` and rename. dtype None: that of the weights.

    Raises:
        UserError: one line for every fault, before anything is written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; remove it or name another one")
    if vocabulary is not None:
        read_vocabulary(vocabulary)
    tensors = load_pth(source)
    raw = hf_config(tensors, str(source))
    weights = hf_tensors(tensors, parse_rwkv6(raw, str(source)), str(source))
    dtype = dtype or functools.reduce(torch.promote_types, {w.dtype for w in weights.values()})
    partial = beside(folder)
    with disk_faults(partial):
        start_folder(partial)
        (partial / "config.json").write_text(
            json.dumps({**raw, "torch_dtype": str(dtype).removeprefix("torch.")}, indent=2)
        )
        if vocabulary is not None:
            shutil.copyfile(vocabulary, partial / VOCABULARY)
        shapes = {name: weight.shape for name, weight in weights.items()}
        slots, headers = plan_files(partial, shapes, dtype, max_file_bytes)
        check_space(partial, slots, shapes)
        write_headers(slots, headers)
        with Progress("writing the weights", len(weights), "tensors", said=tell, always=True) as progress:
            for name, weight in weights.items():
                write_rows(slots[name], 0, weight)
                progress.update()
        sync_files(headers)
        publish(partial, folder)


def to_pth(assets: str, path: Path, dtype: torch.dtype | None) -> None:
    """Write beside `path` and rename. dtype None: that of each weight's file.

    Raises:
        UserError: the directory is not of an RWKV-6, or cannot be read, or the file is there already, or cannot be
            written: for want of room before a weight is read.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; remove it or name another file")
    config = read_model_config(assets, MODEL_TYPE)
    files, shapes = open_model_weights(assets, config), parameter_shapes(config)
    dtypes = {name: dtype or files.dtype(name) for name in shapes}
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, sum(shape.numel() * dtypes[name].itemsize for name, shape in shapes.items()))
        tensors = {}
        for name, shape in shapes.items():
            tensors[pth_name(name)] = weight = torch.empty(shape, dtype=dtypes[name])
            files.read_into(name, weight)
        replace_file(path, functools.partial(_save, tensors))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As torch.save, but that it raises the OSError of a file that cannot be written."""
    try:
        with open(path, "wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:  # torch's writer covers the file's error by one of its own
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def main() -> None:
    parser = ToolParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    hf = commands.add_parser("to-hf", help="a .pth file to a Hugging Face directory")
    hf.add_argument("source", type=user_path, help="the .pth file")
    hf.add_argument("out", type=user_path, help="the directory to write")
    hf.add_argument("--vocabulary", type=user_path, help=f"the World tokenizer's file, {VOCABULARY}")
    hf.add_argument("--max-shard-size-gb", type=float, default=5.0, help="largest size of a file in GB")
    pth = commands.add_parser("to-pth", help="a Hugging Face directory to a .pth file")
    pth.add_argument("assets", type=expand_home, help="Hugging Face directory")
    pth.add_argument("out", type=user_path, help="the file to write")
    for command in (hf, pth):
        command.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        if args.command == "to-hf":
            to_hf(args.source, args.out, args.vocabulary, dtype, args.max_shard_size_gb * 1e9)
        else:
            to_pth(args.assets, args.out, dtype)
    except UserError as error:
        manager.exit_with(str(error).splitlines())


if __name__ == "__main__":
    main()
