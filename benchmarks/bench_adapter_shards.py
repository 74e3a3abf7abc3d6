"""LoRA's adapters: sharded by FSDP2 with the weights that they stand beside, or whole on every worker.

    python -m benchmarks.bench_adapter_shards                    # spawns 2 gloo workers with one thread each
    python -m benchmarks.bench_adapter_shards --gather-once

sharded: FSDP2 gathers them with every block, forward and backward, and reduce-scatters their gradients after every
backward pass; each worker's optimizer works on its shards.
summed once: as a run has them. The same, but gradients are reduce-scattered after the last micro-batch alone; until
then every worker holds them whole.
replicated: FSDP2 leaves them alone. Their gradients are views of a flat tensor that one all-reduce sums after the last
micro-batch; every worker's optimizer works on all of them.

A step of shapes too small to compute, so that the host's time is what is seen. Both train the same: their losses are
compared. CPU ms: processor time of the first worker, whole steps, medians over interleaved repetitions; the ratio is
the median of ratios within a repetition. received: bytes that a worker receives in a step, all weights included. held:
bytes of the adapters, their summed gradients and moments on a worker.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from titan_hd.adapters.adapter_linear import adapter_layers
from titan_hd.adapters.lora import LoRA
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.flat import lay_out
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import parallelize
from titan_hd.distributed.shards import materialize
from titan_hd.models.head import Targets
from titan_hd.models.registry import build_model, parse_hf_config
from titan_hd.seeding import stable_seed

VARIANTS = ("sharded", "summed once", "replicated")


class Received(TorchDispatchMode):
    """Bytes that this worker receives in collectives, as the algorithms' minimum."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, function, types, arguments: tuple = (), kwargs=None):
        name, others = str(function), self.size - 1
        if name.startswith("c10d._allgather_base_"):
            self.bytes += others * arguments[1].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.bytes += others * arguments[0].nbytes
        elif name.startswith("c10d.allreduce_"):
            self.bytes += 2 * others * sum(t.nbytes for t in arguments[0]) // self.size
        return function(*arguments, **(kwargs or {}))


def sharded_values(parameter: nn.Parameter, name: str) -> None:
    """The same values whoever holds which part."""
    whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(stable_seed(name)))
    whole *= 0.02 if "norm" not in name else 1.0
    if isinstance(parameter, DTensor):
        rows = len(parameter.to_local())
        first = dist.get_rank() * -(-len(whole) // dist.get_world_size())
        parameter.to_local().copy_(whole[first : first + rows])
    else:
        parameter.copy_(whole)


def build(args: argparse.Namespace, variant: str) -> tuple[Callable[[], float], int]:
    """A whole step of a variant, which returns this worker's loss; and the bytes held."""
    config = parse_hf_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": args.hidden,
            "intermediate_size": 2 * args.hidden,
            "num_hidden_layers": args.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        },
        "bench_adapter_shards",
    )
    dims = ParallelDims(1, dist.get_world_size(), "cpu")
    with torch.device("meta"):
        model = build_model(config)
    LoRA(rank=args.rank, scale=1.0).apply(model, None)
    layers = adapter_layers(model)
    places = [(layer, key) for layer in layers.values() for key in layer.adapter_names]
    whole = {getattr(layer, key) for layer, key in places} if variant == "replicated" else set()
    parallelize(model, dims, whole, torch.float32, "none", False)
    materialize(model, torch.device("cpu"))
    fsdp = cast(FSDPModule, model)
    if args.gather_once:
        fsdp.set_reshard_after_forward(False)
    flat = None
    if whole:
        shapes = [tuple(getattr(layer, key).shape) for layer, key in places]
        pieces = list(lay_out(shapes))
        flat = nn.Parameter(torch.zeros(sum(torch.Size(shape).numel() for shape in shapes)))
        flat.grad = torch.zeros_like(flat)
        for (layer, key), piece in zip(places, pieces):
            view = nn.Parameter(piece.of(flat.detach()))
            view.grad = piece.of(flat.grad)
            setattr(layer, key, view)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sharded_values(parameter, name)
    trained = [flat] if flat is not None else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 64, (1, args.tokens), generator=generator)
    targets = Targets(torch.arange(args.tokens), ids[0])
    total = args.micro_batches * args.tokens * dist.get_world_size()

    def step() -> float:
        optimizer.zero_grad(set_to_none=flat is None)
        losses = torch.zeros(())
        for m in range(args.micro_batches):
            last = m == args.micro_batches - 1
            if variant == "summed once":
                fsdp.set_requires_gradient_sync(last)
            if args.gather_once:
                fsdp.set_reshard_after_backward(last)
            loss = model(ids, targets=targets) / total
            loss.backward()
            losses += loss.detach()
        if flat is not None and flat.grad is not None:
            dist.all_reduce(flat.grad)
        optimizer.step()
        return losses.item()

    return step, 16 * sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained)


def work(rank: int, args: argparse.Namespace, folder: str, queue) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), args.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    built = {variant: build(args, variant) for variant in VARIANTS}
    steps = {variant: step for variant, (step, _) in built.items()}
    losses = {variant: [step() for _ in range(3)] for variant, step in steps.items()}
    received = {}
    for variant, step in steps.items():
        with Received(args.workers) as counter:
            step()
        received[variant] = counter.bytes
    timing = common.interleave(steps, torch.device("cpu"), args.repetitions, warmup=2, before=dist.barrier)
    if rank == 0:
        cpu = common.medians(timing.cpu)
        queue.put(
            {
                variant: {
                    "cpu_ms": cpu[variant] * 1e3,
                    "ratio": common.median_ratio(timing.cpu, variant, "sharded"),
                    "received": received[variant],
                    "held": built[variant][1],
                    "losses": losses[variant],
                }
                for variant in VARIANTS
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = ToolParser(__doc__)
    for name, default in {"workers": 2, "layers": 32, "hidden": 64, "rank": 16, "tokens": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--gather-once", action="store_true", help="keep W, with all variants, for the whole step")
    args = parser.parse_args()
    environment = common.environment(torch.device("cpu"), 1)
    common.print_header(
        f"LoRA, {args.layers} blocks, r = {args.rank}, {args.micro_batches} micro-batches, {args.workers} workers",
        environment,
    )
    with tempfile.TemporaryDirectory() as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(work, (args, folder, queue), nprocs=args.workers)
        results = queue.get()
    rows = [[name, r["cpu_ms"], r["ratio"], r["received"] / 1e6, r["held"] / 1e6] for name, r in results.items()]
    common.print_table(["adapters", "CPU ms", "of sharded", "MB received", "MB held"], rows)
    common.print_json("bench_adapter_shards", environment, results)


if __name__ == "__main__":
    main()
