"""Writes the model as a Hugging Face directory that transformers, vLLM and lm-eval open."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from titan_hd.config.errors import UserError
from titan_hd.data.tokenizer import TOKENIZER_FILES
from titan_hd.distributed.collectives import together
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import write_weights
from titan_hd.models.decoder import Decoder

logger = logging.getLogger("titan_hd")


def export_hf(model: Decoder, dims: ParallelDims, folder: Path, dtype: torch.dtype, assets: str) -> None:
    """Write config.json, safetensors in `dtype` and the tokenizer files of `assets` beside, then rename to `folder`.

    Every rank calls this; each writes the rows that it owns. fp32 masters are rounded once.
    """
    partial = folder.with_name(folder.name + ".partial")
    with together("looking at the export folder"):
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise UserError(f"export.folder: {folder} is there and holds no model; name another folder")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(_hf_config(model, dtype), indent=2) + "\n")
        for name in TOKENIZER_FILES if assets else ():
            if (Path(assets) / name).exists():
                shutil.copyfile(Path(assets) / name, partial / name)
    dist.barrier()
    write_weights(model, dims, partial, dtype, dist.barrier)
    if dist.get_rank() == 0:
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        logger.info("exported the model to %s", folder)
    dist.barrier()


def _hf_config(model: Decoder, dtype: torch.dtype) -> dict:
    config = dict(model.config.hf)
    # transformers 5 reads `dtype`, older versions and vLLM `torch_dtype`.
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    return config
