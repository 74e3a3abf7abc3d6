"""Converts between titan_hd's checkpoints (torch.distributed.checkpoint) and Hugging Face directories, in one process.

    python tools/convert_checkpoint.py dcp-to-hf outputs/checkpoint/step-500 OUT --assets assets/hf/Llama-3.1-8B
    python tools/convert_checkpoint.py hf-to-dcp assets/hf/Llama-3.1-8B OUT

`dcp-to-hf` takes the weights of a run's checkpoint, with its adapters merged in, and everything else (config,
tokenizer) from the base model. Whatever mesh wrote the checkpoint, one tensor and one of its stored shards are in
memory at a time. No code in it is run.

`hf-to-dcp` writes the weights alone, under the names that a run's checkpoint gives them ("model." and HF's name), one
file for each tensor, so that one tensor is in memory at a time. For other trainers, and for `dcp-to-hf`; a titan_hd run
starts from the HF directory itself and does not resume from it (it has no factors and no optimizer).
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from titan_hd.checkpoint.folder import STATE_FILE, read_train_state
from titan_hd.checkpoint.pretrained import as_trained
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.checkpoint.weights import CheckpointWeights
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.console import Progress, tell
from titan_hd.data.build import Answering
from titan_hd.errors import UserError
from titan_hd.export.hf import beside, check_assets, check_folder, publish, start_folder, write_assets
from titan_hd.export.model_card import model_card
from titan_hd.files import disk_faults, expand_home, user_path
from titan_hd.models.hf_files import (
    WeightFiles,
    check_space,
    open_model_weights,
    plan_files,
    read_model_config,
    sync_files,
    write_headers,
    write_rows,
)
from titan_hd.models.registry import parameter_shapes


def dcp_to_hf(checkpoint: Path, folder: Path, assets: str, dtype: torch.dtype | None, max_file_bytes: float) -> None:
    """Write beside `folder` and rename. dtype None: that of the checkpoint.

    Raises:
        UserError: one line for every fault, before anything is written.
    """
    state = read_train_state(checkpoint) if (checkpoint / STATE_FILE).is_file() else {}  # {}: no run wrote it
    check_folder(folder, assets)
    check_assets(assets)
    config = as_trained(read_model_config(assets), state)
    weights = CheckpointWeights(CheckpointReader(checkpoint), state, config, assets)
    shapes, stored = weights.shapes, _one_dtype(checkpoint, weights.dtypes)
    dtype, settings = dtype or stored, state.get("settings", {})
    base = "" if settings.get("model", {}).get("flavor") else assets
    card = model_card(config.hf, base, settings, {"step": state["step"]} if state else {})
    partial = beside(folder)
    with disk_faults(partial):
        start_folder(partial)
        write_assets(partial, config.hf, dtype, assets, card, Answering(**state.get("answering", {})))
        slots, headers = plan_files(partial, shapes, dtype, max_file_bytes)
        check_space(partial, slots, shapes)
        write_headers(slots, headers)
        with Progress("writing the weights", len(shapes), "tensors", said=tell, always=True) as progress:
            for name in shapes:
                values = torch.empty(shapes[name], dtype=torch.float32 if name in weights.merged else stored)
                weights.read_into(name, values)
                write_rows(slots[name], 0, values)
                progress.update()
        sync_files(headers)
        publish(partial, folder)


def _one_dtype(checkpoint: Path, dtypes: set[torch.dtype]) -> torch.dtype:
    """That holds all stored weights: what a run leaves alone may have fewer bits than what it changes."""
    if not all(dtype.is_floating_point for dtype in dtypes):
        names = ", ".join(sorted(map(str, dtypes)))
        raise UserError(f"{checkpoint}: the weights must have floating-point dtypes, not {names}")
    # None are stored: every weight is the base model's.
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def hf_to_dcp(assets: str, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the weights as a checkpoint, beside and renamed. dtype None: that of each tensor's file."""
    partial = beside(folder)
    for path in (folder, partial):  # of a run that saves there it would be the checkpoint
        if path.exists():
            raise UserError(f"{path}: is there already; remove it or name another folder")
    config = read_model_config(assets)
    files = open_model_weights(assets, config)
    if files.missing:
        raise UserError(f"{assets}: holds no classification head, which a run would draw")
    tensors = {
        f"model.{name}": torch.empty(shape, dtype=dtype or files.dtype(name), device="meta")
        for name, shape in parameter_shapes(config).items()
    }
    bar = Progress("writing the weights", len(tensors), "tensors", said=tell, always=True)
    with disk_faults(partial), bar:
        start_folder(partial)
        # DCP keeps all tensors of a file in memory until the file is closed: hence one file for each.
        writer = dcp.FileSystemWriter(str(partial), single_file_per_rank=False)
        try:
            dcp.save(tensors, storage_writer=writer, planner=_FromFiles(files, bar), no_dist=True)
        except CheckpointException as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = next(iter(error.failures.values()))[0]
            raise UserError(str(reason) if isinstance(reason, UserError) else f"{partial}: {reason}") from None
        publish(partial, folder)


class _FromFiles(dcp.DefaultSavePlanner):
    """Plans with meta tensors, and reads each one's values when it is about to be written."""

    def __init__(self, files: WeightFiles, bar: Progress):
        super().__init__()
        self.files, self.bar = files, bar

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        values = torch.empty_like(self.lookup_object(write_item.index), device="cpu")
        self.files.read_into(write_item.index.fqn.removeprefix("model."), values)
        self.bar.update()
        return values


def main() -> None:
    parser = ToolParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("dcp-to-hf", help="a run's checkpoint to a Hugging Face directory")
    to_hf.add_argument("checkpoint", type=user_path, help="the folder step-N")
    to_hf.add_argument("out", type=user_path, help="the directory to write")
    to_hf.add_argument("--assets", type=expand_home, required=True, help="Hugging Face directory of the base model")
    to_hf.add_argument("--max-shard-size-gb", type=float, default=5.0, help="largest size of a file in GB")
    to_dcp = commands.add_parser("hf-to-dcp", help="a Hugging Face directory to a checkpoint of weights")
    to_dcp.add_argument("assets", type=expand_home, help="Hugging Face directory")
    to_dcp.add_argument("out", type=user_path, help="the folder to write")
    for command in (to_hf, to_dcp):
        command.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        if args.command == "dcp-to-hf":
            dcp_to_hf(args.checkpoint, args.out, args.assets, dtype, args.max_shard_size_gb * 1e9)
        else:
            hf_to_dcp(args.assets, args.out, dtype)
    except UserError as error:
        manager.exit_with(str(error).splitlines())


if __name__ == "__main__":
    main()
