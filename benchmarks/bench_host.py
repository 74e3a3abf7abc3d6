"""What the host does in a step beside forward and backward: milliseconds and operations, on tiny shapes.

    python -m benchmarks.bench_host                      # one gloo worker, one thread
    python -m benchmarks.bench_host --optimizer SGD --adapters 8

Part "optimizer": HD-PiSSA on 32 blocks of 7 linear layers, from the last backward pass to the next step: zero the
gradients, norm and clipping, the optimizer's step, the check that all is finite, the fold. On these shapes the
arithmetic is nothing, and what is measured is what keeps a GPU waiting. "operations" are those of ATen that
torch.profiler counts in one call, views and allocations apart: each is a kernel on a GPU.

Part "rounding": how a bf16 weight [1024, 4096] takes an update with stochastic rounding, operation by operation as on
CPUs, and compiled as on GPUs ("--compile": that takes half a minute). bytes are those that the operations read and
write for each element; the compiled kernel reads weight and update and writes the weight, 8 bytes.

The products of the fold and what they are made of (224 products, and their operands) are the row "fold's products":
the same tensors, without anything around them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.components.dtypes import resolve_dtypes
from titan_hd.components.update import build_update
from titan_hd.config.command_line import ToolParser
from titan_hd.config.job_config import JobConfig
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import parallelize
from titan_hd.distributed.shards import init_weights, materialize
from titan_hd.distributed.update import rounding
from titan_hd.models.registry import build_model, parse_hf_config

BLOCKS, HIDDEN, RANK, LR = 32, 32, 2, 1e-4
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Operations that launch no kernel.
_FREE = (
    *("view", "reshape", "as_strided", "slice", "select", "split", "split_with_sizes", "transpose", "t", "flatten"),
    *("unflatten", "narrow", "expand", "unsqueeze", "squeeze", "detach", "alias", "empty", "empty_like", "new_empty"),
    *(
        "empty_strided",
        "to",
        "item",
        "lift_fresh",
        "detach_",
        "resolve_conj",
        "resolve_neg",
        "chunk",
        "float",
        "_unsafe_view",
    ),
)


def build(args: argparse.Namespace):
    """The update of a sharded model, ready for its first step."""
    config = JobConfig()
    config.adapter.rank, config.hdpissa.num_adapters = RANK, args.adapters
    config.optimizer.name, config.training.max_norm = args.optimizer, 1.0
    config = resolve_dtypes(config, "cpu", files=None, saved=None)
    dims = ParallelDims(1, 1, "cpu")
    method = HDPissa(args.adapters, RANK)
    with torch.device("meta"):
        model = build_model(parse_hf_config(MODEL, "bench_host"))
    method.apply(model, None)
    update = build_update(model, method, dims, config)
    parallelize(model, dims, update.ignored_parameters(), torch.float32, "none", False)
    materialize(model, torch.device("cpu"))
    update.build_optimizer(torch.device("cpu"))
    init_weights(model, dims, seed=0)
    for _ in update.first_values():
        pass
    update.start(total_steps=1)
    return update


class Steps:
    """Steps without forward and backward: the gradients are noise."""

    def __init__(self, update):
        self.update, self.step = update, 0
        entries = update.registry.entries.values()
        self.deltas = [p for e in entries for p in (e.layer.delta_A, e.layer.delta_B)]

    def begin(self) -> None:
        self.update.begin_step(LR, self.step)
        with torch.no_grad():
            for delta in self.deltas:
                delta.grad.to_local().normal_(0.0, 1e-2)

    def finish(self) -> None:
        norm = self.update.finish_gradients()
        numbers = torch.stack((norm, self.update.propose(norm))).tolist()
        self.update.refuse_non_finite(self.step, *numbers)
        self.update.apply(LR, self.step)
        self.step += 1

    def bind(self) -> None:
        self.update.bind(0, last=False)

    def zero(self) -> None:
        self.update.begin_step(LR, self.step)


def products(update) -> Callable[[], None]:
    """The fold's arithmetic on tensors that are there: per weight, two operands stacked and one product."""
    held = []
    for entry in update.registry.entries.values():
        out, width = entry.shape
        m = update.registry.num_adapters * RANK
        held.append([torch.zeros(out, width), *(torch.zeros(s) for s in ((m, width), (out, m), (m, width), (out, m)))])

    @torch.no_grad()
    def run() -> None:
        for w, a, b, da, db in held:
            w.addmm_(torch.cat((db, b + db), 1), torch.cat((a, da), 0), beta=1.0, alpha=0.5)

    return run


def operations(function: Callable[[], None]) -> int:
    """Operations of one call that are a kernel each on a GPU; those that others are made of are not counted twice."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    leaves = [e for e in profile.events() or () if e.name.startswith("aten::") and not e.cpu_children]
    return sum(e.name.removeprefix("aten::") not in _FREE for e in leaves)


class MovedBytes(TorchDispatchMode):
    """Bytes that operations inside the context read and write, and the number of these operations."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        if function.overloadpacket.__name__ not in _FREE:
            tensors = [t for t in tree_leaves((arguments, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.nbytes for t in tensors)
            self.operations += 1
        return result


def measure_rounding(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    n, m = 1024, 4096
    w, update, keep = torch.randn(n, m).bfloat16(), 1e-3 * torch.randn(n, m), torch.ones(())
    operands = (w, update, keep, rounding.row_hashes(1, torch.arange(n)), torch.arange(m, dtype=torch.int32))
    variants = {"rounding, eager": lambda: rounding.add_rounded(*operands)}
    if args.compile:
        compiled = torch.compile(rounding._add_rounded, dynamic=True)
        variants["rounding, compiled"] = lambda: compiled(*operands)
    timing = common.interleave(variants, torch.device("cpu"), args.repetitions, warmup=2)
    results = {}
    for name, wall in common.medians(timing.wall).items():
        results[name] = {
            "ms": wall * 1e3,
            "cpu_ms": common.medians(timing.cpu)[name] * 1e3,
            "operations": 1,
            "bytes": 8.0,
        }
    with MovedBytes() as moved:
        rounding.add_rounded(*operands)
    results["rounding, eager"] |= {"operations": moved.operations, "bytes": moved.total / w.numel()}
    return results


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    update = build(args)
    steps = Steps(update)
    variants = {
        "zero gradients": steps.zero,
        "clip, optimizer, check, fold": steps.finish,
        "fold's products": products(update),
        "bind a micro-batch": steps.bind,
    }
    timing = common.interleave(variants, torch.device("cpu"), args.repetitions, warmup=3, before=steps.begin)
    results = {}
    for name, wall in common.medians(timing.wall).items():
        steps.begin()
        cpu = common.medians(timing.cpu)[name]
        results[name] = {"ms": wall * 1e3, "cpu_ms": cpu * 1e3, "operations": operations(variants[name])}
    return results


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=["optimizer", "rounding"], default=["optimizer", "rounding"])
    parser.add_argument("--compile", action="store_true", help="measure the compiled rounding too")
    parser.add_argument("--optimizer", default="AdamW", help="a class of torch.optim")
    parser.add_argument("--adapters", type=int, default=1, help="K")
    parser.add_argument("--repetitions", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    environment = common.environment(torch.device("cpu"), 1)
    common.print_header(f"host work of a step, {BLOCKS} blocks, {args.optimizer}, K = {args.adapters}", environment)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        results = measure(args) if "optimizer" in args.parts else {}
        results |= measure_rounding(args) if "rounding" in args.parts else {}
        dist.destroy_process_group()
    rows = [[name, r["ms"], r["cpu_ms"], r["operations"], r.get("bytes")] for name, r in results.items()]
    common.print_table(["part", "ms", "CPU ms", "operations", "bytes an element"], rows)
    common.print_json("bench_host", environment, results)


if __name__ == "__main__":
    main()
