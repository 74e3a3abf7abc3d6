"""How much memory a configuration needs on each GPU, and whether a card has it. Needs neither weights nor a GPU.

    python tools/estimate_memory.py --config train_configs/llama31_8b_hdpissa.toml --model.flavor 8B --card 80
    python tools/estimate_memory.py --config FILE --gpus 8 --card 24 --grid

Other options are those of a run (--section.key value). A model whose directory is not there needs model.flavor, and is
taken to have files in bfloat16.
--card: GiB of one GPU, as it is sold. --grid: the total for every activation_checkpoint.mode, training.master_dtype and
several training.local_batch_size, in place of the items.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_hd.components.memory import GB
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.fitting import estimate_run, gathering, too_little, usable_bytes
from titan_hd.preflight import RunPlan, plan_run

_BATCHES = (1, 2, 4, 8)


def plan_of(argv: list[str], gpus: int) -> RunPlan:
    """The run's plan on so many GPUs, without files. UserError as a run's."""
    config: JobConfig = manager.load([*argv, "--job.print_plan=true"])
    return plan_run(config, gpus, needs_files=False, device_type="cuda", unseen_files=torch.bfloat16)


def grid(argv: list[str], gpus: int, available: int | None) -> str:
    """GB per GPU; those that do not fit have an x."""
    lines = [f"{'masters':<10}{'checkpointing':<14}" + "".join(f"{f'B = {b}':>10}" for b in _BATCHES)]
    resolved = plan_of(argv, gpus).config.training.master_dtype
    for master in ("float32", "bfloat16"):
        for mode in ("none", "selective", "full"):
            row = f"{master:<10}{mode:<14}"
            for batch in _BATCHES:
                options = {
                    "training.master_dtype": "auto" if master == resolved else master,
                    "activation_checkpoint.mode": mode,
                    "training.local_batch_size": batch,
                    "training.global_batch_size": -1,
                }
                plan = plan_of([*argv, *(f"--{key}={value}" for key, value in options.items())], gpus)
                total = estimate_run(plan, "cuda").total
                row += f"{total / GB:>8.1f}" + (" x" if available is not None and total > available else "  ")
            lines.append(row.rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs of the run")
    parser.add_argument("--card", type=float, help="GiB of one GPU, for example 24, 48, 80")
    parser.add_argument("--grid", action="store_true", help="totals of several settings")
    args, argv = parser.parse_with_run_options()
    available = None if args.card is None else usable_bytes(args.card)
    try:
        if args.grid:
            print(grid(argv, args.gpus, available))
            return
        plan = plan_of(argv, args.gpus)
        print(estimate_run(plan, "cuda").table())
        if available is not None:
            gathers = gathering(plan, "cuda", available)
            if gathers:
                print(gathers)
            fits = f"fits on {args.gpus} x {args.card:g} GiB ({available / GB:.1f} GB usable)"
            print(too_little(plan, "cuda", available) or fits)
    except UserError as error:
        manager.exit_with(str(error).splitlines())


if __name__ == "__main__":
    main()
