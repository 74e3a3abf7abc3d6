"""What a step costs on 1 to 4,096 GPUs, on paper: compute, all-gathers of the weights, exchange of the updates, the
host's time, memory. And what to set on how many GPUs.

    python tools/scaling.py --model llama3 --flavor 8B
    python tools/scaling.py --recipe                                  # 8B on 1 to 512 GPUs, 70B on 8, 64 and 512
    python tools/scaling.py --recipe --flavor 70B --gpus 32 --card 141 --samples all
    python tools/scaling.py --recipe --gpus 1,8,64 --global-batch 64  # the same run on more GPUs
    python tools/scaling.py --settings --gpus 8,64                    # the paper's setting, samples = all, new slices
    python tools/scaling.py --flavor 70B --adapters 8 --gpus 64,512,4096 --network 25 --utilisation 0.5
    python tools/scaling.py --gpus 8 --tokens 1024 --length 512 --micro-batches 8 --records 395000   # hours of an epoch

Weak scaling: every GPU computes `--tokens` per micro-batch and `--micro-batches` per optimizer step. Bytes of the
exchange are those of the update's routes (`distributed/update`), gathers those of the FSDP2 groups; both equal what
the collectives count (tests/distributed/test_scaling.py). Memory is the estimate that a run makes of itself
(docs/memory.md). Seconds are bytes over an assumed bandwidth: see docs/scaling.md for the assumptions.

--recipe: for every number of GPUs, of the meshes, of 1 to 8 sequences of --length in a micro-batch, of the modes of
activation checkpointing and of the dtypes of the masters those that are fastest and fit; bf16 masters, whose numbers
are others, only where fp32 ones do not fit. Then the options of such a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from step_costs import Checkpointing, Cluster, Estimate, Masters, Work, authors_estimate, best

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.topology import WIRE_BYTES
from titan_hd.errors import UserError
from titan_hd.fitting import usable_bytes
from titan_hd.models.registry import flavor_config

# What --recipe shows without --flavor, and on how many GPUs without --gpus.
_GROWING = {"8B": [2**i for i in range(10)], "70B": [8, 64, 512]}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(work: Work, gpu_counts: list[int], num_adapters: list[int], cluster: Cluster, samples: str = "own") -> str:
    """Rows for every number of GPUs: K of the list on both routes, K = GPUs, and the authors' scheme."""
    lines = [
        f"{'GPUs':>5} {'K':>5}  {'mesh':<10}{'route':<8} {'compute':>8} {'gathers':>8} {'host':>7} {'exchange':>8}"
        f" {'gap':>6} {'step s':>8} {'of ideal':>8} {'GB gathered':>11} {'exchanged':>9} {'GB needed':>9}"
        f"{'    hours' if work.records else ''}"
    ]
    for gpus in gpu_counts:
        most = max(k for k in range(1, min(gpus, work.largest_k) + 1) if gpus % k == 0)
        ks = sorted({k for k in [*num_adapters, most] if k <= work.largest_k})
        rows = [best(work, gpus, k, route, cluster, samples) for k in ks for route in ROUTES]
        lines += [_line(row, work, cluster.memory) for row in rows]
        if gpus <= work.largest_k:
            lines.append(_line(authors_estimate(work, gpus, cluster), work, cluster.memory))
        else:
            lines.append(
                f"{gpus:>5} {gpus:>5}  {'whole W':<10}{'authors':<8} impossible: K * r = {gpus * work.rank} singular "
                f"directions, the smallest weight has {work.largest_k * work.rank}"
            )
    return "\n".join(lines)


def _line(row: Estimate, work: Work, memory: float) -> str:
    head = f"{row.gpus:>5} {row.num_adapters:>5}  {row.mesh:<10}{row.route:<8}"
    seconds = f" {row.compute:>8.3f} {row.gathers:>8.3f} {row.host:>7.3f} {row.exchange:>8.3f} {row.gap:>6.3f}"
    seconds += f" {row.step:>8.3f}"
    sizes = f" {row.efficiency:>8.1%} {row.gathered / 1e9:>11.2f} {row.exchanged / 1e9:>9.3f} {row.memory / 1e9:>9.1f}"
    sizes += f" {work.epoch_hours(row.gpus, row.step):>8.1f}" if work.records else ""
    return head + seconds + sizes + ("  does not fit" if row.memory > memory else "")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

_SEQUENCES = (1, 2, 4, 8)
_WORTH = 1.02  # what a way must be faster by, to be preferred to one that needs less memory


@dataclass(frozen=True)
class Recipe:
    """A way to run on so many GPUs. work, row: of one step; short: a quicker one needs more memory than there is."""

    work: Work
    row: Estimate
    short: bool = False

    @property
    def sequences(self) -> int:
        """Of a micro-batch."""
        return self.work.tokens // self.work.length

    @property
    def global_batch(self) -> int:
        return self.row.gpus * self.work.micro_batches * self.sequences

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.global_batch * self.work.length / self.row.step

    def options(self) -> str:
        """Of ./run_train.sh, beside `common_options`."""
        options: dict[str, object] = {
            "parallelism.data_parallel_replicate_degree": self.row.mesh.partition(" x ")[0],
            "training.local_batch_size": self.sequences,
            "training.global_batch_size": self.global_batch,
            # "auto" has fp32 masters of what the fold changes, and leaves the rest in the dtype of its files.
            "training.master_dtype": "auto" if self.work.masters == "float32" else self.work.masters,
            "activation_checkpoint.mode": self.work.checkpointing,
        }
        return _words(options)


def common_options(work: Work, num_adapters: int, samples: str) -> str:
    """What a run on any number of GPUs sets."""
    wire = next(name for name, size in WIRE_BYTES.items() if size == work.wire_bytes)
    options = {
        "training.seq_len": work.length,
        "training.mixed_precision_param": "bfloat16",
        "adapter.rank": work.rank,
        "hdpissa.num_adapters": num_adapters,
        "hdpissa.samples": samples,
        "hdpissa.refresh_steps": work.refresh_steps,
        "hdpissa.local_steps": work.local_steps,
        "hdpissa.exchange_dtype": wire,
    }
    defaults = {"own", "float32", ("hdpissa.refresh_steps", 0), ("hdpissa.local_steps", 1)}
    return _words({key: value for key, value in options.items() if not {value, (key, value)} & defaults})


def _words(options: dict[str, object]) -> str:
    return " ".join(f"--{key} {value}" for key, value in options.items())


def _micro_batches(work: Work, gpus: int, num_adapters: int, sequences: int, samples: str, global_batch: int) -> int:
    """Of a GPU in a step; 0 where the global batch cannot be dealt in such micro-batches."""
    hosted = max(1, num_adapters // gpus) if samples == "own" else 1
    if not global_batch:
        return hosted * work.micro_batches
    micro_batches, rest = divmod(global_batch, gpus * sequences)
    return 0 if rest or micro_batches % hosted else micro_batches


def recipe(
    work: Work, gpus: int, num_adapters: int, cluster: Cluster, samples: str = "own", global_batch: int = 0
) -> Recipe | None:
    """The way that computes most tokens per second, of those that fit; of those within 2% of it, the one that needs
    least memory. None: none fits.

    work: without sequences, checkpointing and masters; its micro_batches are those of an adapter where a GPU has
    several, else of a GPU. global_batch: sequences of a step, in place of these; 0: as many as come.
    """
    for masters in get_args(Masters):
        fitting, too_large = [], []
        for checkpointing in get_args(Checkpointing):
            for sequences in _SEQUENCES:
                micro_batches = _micro_batches(work, gpus, num_adapters, sequences, samples, global_batch)
                if not micro_batches:
                    continue
                tokens = sequences * work.length
                way = dataclasses.replace(
                    work, tokens=tokens, micro_batches=micro_batches, checkpointing=checkpointing, masters=masters
                )
                found = Recipe(way, best(way, gpus, num_adapters, "auto", cluster, samples))
                if found.row.memory > cluster.memory:
                    too_large.append(found.tokens_per_second)
                    break  # more sequences need more
                fitting.append(found)
                if found.row.efficiency > 1 / _WORTH:
                    break  # more sequences would bring less than that
        if fitting:
            most = max(one.tokens_per_second for one in fitting)
            chosen = min((o for o in fitting if o.tokens_per_second >= most / _WORTH), key=lambda o: o.row.memory)
            return dataclasses.replace(chosen, short=max(too_large, default=0) > _WORTH * most)
    return None


def recipes(
    work: Work, gpu_counts: list[int], num_adapters: int, cluster: Cluster, samples: str = "own", global_batch: int = 0
) -> str:
    """A row for every number of GPUs, and then their options."""
    lines = [
        f"{'GPUs':>5} {'K':>3}  {'mesh':<9} {'batch':>5} {'micro':>5} {'global':>6}  {'checkpointing':<13}"
        f" {'masters':<8} {'GB':>5} {'step s':>8} {'tokens/s':>11} {'a GPU':>7} {'of ideal':>8}"
        f"{'    hours' if work.records else ''}  bound by"
    ]
    options = [f"  all: {common_options(work, num_adapters, samples)}"]
    for gpus in gpu_counts:
        head = f"{gpus:>5} {num_adapters:>3}  "
        if not any(_micro_batches(work, gpus, num_adapters, n, samples, global_batch) for n in _SEQUENCES):
            lines.append(f"{head}a global batch of {global_batch} cannot be dealt to {max(gpus, num_adapters)}")
            continue
        found = recipe(work, gpus, num_adapters, cluster, samples, global_batch)
        if found is None:
            lines.append(f"{head}does not fit, whatever is set")
            continue
        row, way = found.row, found.work
        lines.append(
            f"{head}{row.mesh:<9} {found.sequences:>5} {way.micro_batches:>5}"
            f" {found.global_batch:>6}  {way.checkpointing:<13} {way.masters:<8} {row.memory / 1e9:>5.1f}"
            f" {row.step:>8.3f} {found.tokens_per_second:>11,.0f} {found.tokens_per_second / gpus:>7,.0f}"
            f" {row.efficiency:>8.1%}"
            + (f" {way.epoch_hours(gpus, row.step):>8.1f}" if way.records else "")
            + f"  {row.bound}{', memory' * found.short}"
        )
        options.append(f"{gpus:>5}: {found.options()}")
    return "\n".join([*lines, "", *options])


# ---------------------------------------------------------------------------------------------------------------------
# Settings beside each other


def settings(work: Work, gpu_counts: list[int], num_adapters: int, cluster: Cluster) -> str:
    """The paper's setting, adapters that learn from all samples, slices that are taken anew, and both. Slices anew
    change no step between two of them, so that every T > 0 is the same here."""
    lines = [
        f"{'GPUs':>5} {'K':>3}  {'mesh':<9} {'samples':<7} {'new slices':<10} {'compute':>8} {'step s':>8}"
        f" {'exchanged':>9} {'gradients':>9} {'at a refresh':>12} {'GB needed':>9}"
    ]
    for gpus in gpu_counts:
        for samples in ("own", "all"):
            for anew in (False, True):
                way = dataclasses.replace(work, refresh_steps=int(anew))
                row = best(way, gpus, num_adapters, "auto", cluster, samples)
                lines.append(
                    f"{gpus:>5} {num_adapters:>3}  {row.mesh:<9} {samples:<7} {'every T' if anew else 'never':<10}"
                    f" {row.compute:>8.3f} {row.step:>8.3f} {row.exchanged / 1e9:>9.3f} {row.gradients / 1e9:>9.3f}"
                    f" {row.refreshed / 1e9 if anew else 0:>12.3f} {row.memory / 1e9:>9.1f}"
                    + ("  does not fit" if row.memory > cluster.memory else "")
                )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def _parser() -> ToolParser:
    parser = ToolParser(__doc__)
    parser.add_argument("--model", default="llama3", help="family, as model.name")
    parser.add_argument("--flavor", default="", help="size, as model.flavor: 8B, and with --recipe also 70B")
    parser.add_argument("--gpus", default="", help="numbers of GPUs, above 8 whole nodes: 8,64,512,4096")
    parser.add_argument("--adapters", default="8", help="values of K, beside K = GPUs as far as the rank allows")
    parser.add_argument("--rank", type=int, default=16, help="r of an adapter")
    parser.add_argument("--samples", choices=["own", "all"], default="own", help="as hdpissa.samples")
    parser.add_argument("--refresh-steps", type=int, default=0, help="as hdpissa.refresh_steps: for its memory")
    parser.add_argument("--tokens", type=int, default=8192, help="per GPU and micro-batch")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a GPU in an optimizer step")
    parser.add_argument("--records", type=int, default=0, help="of an epoch, each of --length tokens: adds its hours")
    parser.add_argument(
        "--exchange-dtype", default="float32", choices=list(WIRE_BYTES), help="as hdpissa.exchange_dtype"
    )
    parser.add_argument("--local-steps", type=int, default=1, help="as hdpissa.local_steps; figures are means per step")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s per GPU inside a node")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU between nodes")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU in bf16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that compute reaches")
    parser.add_argument("--card", type=float, default=80, help="GiB of a GPU, as it is sold")
    parser.add_argument(
        "--checkpointing", choices=get_args(Checkpointing), default="full", help="as activation_checkpoint.mode"
    )
    parser.add_argument("--masters", choices=get_args(Masters), default="float32", help="as training.master_dtype")
    parser.add_argument("--host", type=float, default=1, help="times the host's seconds that were measured; 0: none")
    parser.add_argument("--recipe", action="store_true", help="what to set, in place of the table")
    parser.add_argument(
        "--global-batch", type=int, default=0, help="of --recipe: sequences of a step, kept on all rows"
    )
    parser.add_argument(
        "--settings",
        action="store_true",
        help="samples own and all, with and without new slices, in place of the table",
    )
    return parser


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: numbers with commas between them, such as 8,64, not {text!r}") from None


def _check(args: argparse.Namespace, gpus: list[int], adapters: list[int], node: int) -> None:
    """UserError on options that make no sense."""
    for n in gpus:
        if n < 1 or n % min(n, node):
            raise UserError(f"--gpus: {n} GPUs are not whole nodes of {node}")
        for k in adapters:
            if k < 1 or max(k, n) % min(k, n):
                raise UserError(
                    f"--adapters: {k} adapters cannot be dealt to {n} GPUs; one number must divide the other"
                )
    if args.local_steps < 1 or (args.local_steps > 1 and args.samples == "all"):
        raise UserError("--local-steps: a number of steps, at least 1, and above that with --samples own alone")
    if args.local_steps > 1 and args.settings:
        raise UserError("--local-steps: not with --settings, which has adapters that learn from all samples")
    if args.global_batch and not args.recipe:
        raise UserError("--global-batch: is for --recipe; the table has --tokens and --micro-batches")


def _work(args: argparse.Namespace, flavor: str) -> Work:
    return Work(
        config=flavor_config(args.model, flavor),
        rank=args.rank,
        tokens=args.tokens,
        length=args.length,
        micro_batches=args.micro_batches,
        records=args.records,
        wire_bytes=WIRE_BYTES[args.exchange_dtype],
        local_steps=args.local_steps,
        checkpointing=args.checkpointing,
        masters=args.masters,
        refresh_steps=args.refresh_steps,
    )


def report(args: argparse.Namespace, flavor: str, usual: list[int]) -> str:
    """What the options ask for, of one model. usual: numbers of GPUs without --gpus. UserError on what they cannot."""
    cluster = Cluster(
        nvlink=args.nvlink * 1e9,
        network=args.network * 1e9,
        peak=args.peak * 1e12,
        utilisation=args.utilisation,
        memory=usable_bytes(args.card),
        host=args.host,
    )
    gpus = _numbers("--gpus", args.gpus) if args.gpus else usual
    adapters, work = _numbers("--adapters", args.adapters), _work(args, flavor)
    _check(args, gpus, adapters, cluster.node)
    model = f"{args.model} {flavor}, r = {args.rank}"
    step = f"{model}, {args.micro_batches} x {args.tokens} tokens per GPU and step"
    if args.recipe:
        step = f"{model}, sequences of {args.length} tokens, cards of {args.card:g} GiB"
        parts = [recipes(work, gpus, k, cluster, args.samples, args.global_batch) for k in adapters]
    elif args.settings:
        parts = [settings(work, gpus, k, cluster) for k in adapters]
    else:
        parts = [table(work, gpus, adapters, cluster, args.samples)]
    return step + "\n" + "\n\n".join(parts)


def main() -> None:
    args = _parser().parse_args()
    models = {args.flavor or "8B": [8, 64, 512, 4096]}
    if args.recipe and not args.flavor and args.model == "llama3":
        models = _GROWING
    try:
        print(*(report(args, flavor, usual) for flavor, usual in models.items()), sep="\n\n")
    except UserError as error:
        manager.exit_with(str(error).splitlines())


if __name__ == "__main__":
    main()
