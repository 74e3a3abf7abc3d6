"""Sequence and loss parallelism: forward and backward pass of a small decoder, split over tensor-parallel workers.

    python -m benchmarks.bench_tensor_parallel                   # CPU: spawns 2 gloo workers with one thread each
    python -m benchmarks.bench_tensor_parallel --fake --workers 8 --hidden 4096 --intermediate 14336 --tokens 8192

--fake runs rank 0 alone (on a GPU, if there is one, in bf16), over a backend whose collectives return at once: memory
and compute are those of a true rank, communication takes no time, values are meaningless.

Every weight is trained (method full). ms is the slowest worker's, median over repetitions, variants interleaved; memory
is the most that one pass holds beyond weights and gradients, bytes what a worker receives in one (both on rank 0, in
passes of their own); the loss is compared with that of the variant without either.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.parallelize import apply_activation_checkpointing
from titan_hd.distributed.tp.tensor_parallel import apply_tensor_parallel
from titan_hd.models.decoder import Decoder
from titan_hd.models.decoder_config import parse_decoder
from titan_hd.models.head import Targets

VARIANTS = {"neither": (False, False), "sequence": (True, False), "loss": (False, True), "both": (True, True)}


class Received(TorchDispatchMode):
    """Bytes that this worker receives in collectives, as the algorithms' minimum."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, function, types, arguments: tuple = (), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        name, others = str(function), self.size - 1
        if name.startswith("_c10d_functional.all_reduce"):
            self.bytes += 2 * others * result.nbytes // self.size
        elif name.startswith("_c10d_functional.all_gather"):
            self.bytes += others * result.nbytes // self.size
        elif name.startswith("_c10d_functional.reduce_scatter"):
            self.bytes += others * result.nbytes
        elif name.startswith("c10d.allreduce_"):
            self.bytes += 2 * others * sum(t.nbytes for t in arguments[0]) // self.size
        return result


def local(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def build(args: argparse.Namespace, mesh, sequence: bool, loss: bool, inputs: tuple[torch.Tensor, torch.Tensor]):
    """A pass of one variant, as a function that returns the loss."""
    torch.manual_seed(0)
    heads = args.hidden // 64
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "vocab_size": args.vocabulary}
    sizes |= {"num_hidden_layers": args.layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    fixed = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 8192}
    head = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    device = inputs[0].device
    with device:
        model = Decoder(parse_decoder({**head, **sizes, **fixed}, "benchmark"))
        model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    apply_tensor_parallel(model, mesh, sequence, loss)
    if args.fake:  # nothing arrived from the others
        for parameter in model.parameters():
            torch.nn.init.normal_(local(parameter), std=0.02)
    if args.checkpoint != "none":
        apply_activation_checkpointing(model, args.checkpoint)

    def one_pass() -> float:
        value = model(inputs[0], targets=Targets.of(inputs[1]))
        (value / inputs[1].numel()).backward()
        return value.item()

    return one_pass


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    size = dist.get_world_size()
    device = common.pick_device() if args.fake else torch.device("cpu")
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (2, 1, args.tokens), generator=generator).to(device)
    passes: dict[str, Callable[[], float]] = {
        name: build(args, mesh, *flags, (ids[0], ids[1])) for name, flags in VARIANTS.items()
    }
    results = {}
    for name, one_pass in passes.items():
        one_pass()  # gradients are there from now on
        with Received(size) as received:
            loss = one_pass()
        peak = common.peak_extra_bytes(one_pass, device)
        results[name] = {"loss": loss, "received_mb": received.bytes / 1e6, "peak_mib": peak / 2**20}
    timing = common.interleave(passes, device, args.repetitions, before=dist.barrier)
    everyone = [timing] * size
    if not args.fake:
        dist.all_gather_object(everyone, timing)
    for name, result in results.items():
        result["ms"] = 1e3 * statistics.median(max(sample) for sample in zip(*(t.wall[name] for t in everyone)))
        result["cpu_ms"] = 1e3 * statistics.median(sum(sample) for sample in zip(*(t.cpu[name] for t in everyone)))
    return results


def _spawned(rank: int, store: str, args: argparse.Namespace, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, args.workers), rank=rank, world_size=args.workers)
    results = measure(args)
    dist.barrier()
    if rank == 0:
        queue.put(results)
    sys.stdout.flush()
    os._exit(0)  # as titan_hd.process.worker does, and why


def report(env: dict[str, object], results: dict[str, dict[str, float]]) -> None:
    base = results["neither"]
    rows = [
        [
            name,
            f"{r['ms']:.0f}",
            f"{base['ms'] / r['ms']:.2f}",
            f"{base['cpu_ms'] / r['cpu_ms']:.2f}",
            f"{r['received_mb']:.2f}",
            f"{r['peak_mib']:.1f}",
            f"{abs(r['loss'] / base['loss'] - 1):.0e}",
        ]
        for name, r in results.items()
    ]
    common.print_table(["variant", "ms", "x faster", "CPU time", "MB in", "MiB", "difference of loss"], rows)
    common.print_json("tensor_parallel", env, results)


def main() -> None:
    parser = ToolParser(__doc__)
    for name, default in {"workers": 2, "hidden": 512, "intermediate": 1408, "layers": 4, "vocabulary": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--checkpoint", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--fake", action="store_true", help="rank 0 alone; on a GPU if there is one")
    args = parser.parse_args()
    env = common.environment(common.pick_device() if args.fake else torch.device("cpu"), threads=1)
    common.print_header("sequence and loss parallelism", env)
    if args.fake:
        torch.set_num_threads(1)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.workers)
        report(env, measure(args))
        return
    with tempfile.TemporaryDirectory() as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_spawned, (os.path.join(folder, "store"), args, queue), nprocs=args.workers)
        report(env, queue.get())


if __name__ == "__main__":
    main()
