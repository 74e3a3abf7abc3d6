"""Forward + backward of one block with all of its linear layers adapted, by every method.

    python -m benchmarks.bench_methods                                   # CPU: 512 / 1408, r 16, 1024 tokens, fp32
    python -m benchmarks.bench_methods --dtype bfloat16 --hidden 4096 --intermediate 14336 --head-dim 128   # one GPU
    python -m benchmarks.bench_methods --model rwkv6                     # a block of RWKV-6: eight layers

Ratios as in bench_linear: to the frozen block, in the same repetition, repetitions interleaved. bone and bat have
blocks of 2 r, with about as many parameters as the others. The bytes of "peak extra" are those that live at a time in
what the pass allocates; on a CPU they do not include what HiRA and Bat's column form hold inside their operator, which
is two or three matrices of the size of the largest layer, for as long as it runs.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks import bench_linear, common
from titan_hd.adapters.adapter_linear import adapter_layers
from titan_hd.adapters.methods import build_method
from titan_hd.config.command_line import ToolParser
from titan_hd.config.job_config import Adapter, JobConfig
from titan_hd.models import rwkv6
from titan_hd.models.decoder import Block
from titan_hd.models.rope import RotaryEmbedding
from titan_hd.models.rwkv6 import parse_rwkv6

# name -> changes of [adapter], or a variant of bench_linear
BASELINES = {"frozen": "frozen", "full": "full", "hdpissa": "exact mute"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "pissa": {"method": "pissa"},
    "dora": {"method": "dora"},
    "mora 1": {"method": "mora", "mora_type": 1},
    "mora 6": {"method": "mora", "mora_type": 6},
    "hira": {"method": "hira"},
    "bone": {"method": "bone"},
    "bat": {"method": "bat"},
    "bat row": {"method": "bat", "bat_form": "row"},
}


def plain_block(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The block of args.model, with random weights."""
    torch.manual_seed(0)
    with device:
        if args.model == "llama":
            return Block(bench_linear.block_config(args)).to(args.dtype)
        sizes = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "head_size": args.head_dim}
        config = parse_rwkv6({"vocab_size": 1, "num_hidden_layers": 1, **sizes}, "benchmark")
        return rwkv6.Block(config, first=False).to(args.dtype)


def inputs_beside(args: argparse.Namespace, length: int, device: torch.device) -> list[torch.Tensor | None]:
    """What the block takes beside the stream."""
    if args.model != "llama":
        return [None]
    rope = RotaryEmbedding(bench_linear.block_config(args)).to(device)
    return [*rope(torch.arange(length, device=device)[None], args.dtype), None]


def build(args: argparse.Namespace, name: str, device: torch.device) -> nn.Module:
    """A block with a method's layers, at their first values."""
    block = plain_block(args, device)
    if name in BASELINES:
        return bench_linear.adapt_block(block, BASELINES[name], args.rank)
    changes = ADAPTERS[name]
    rank = 2 * args.rank if changes["method"] in ("bone", "bat") else args.rank
    build_method(JobConfig(adapter=Adapter(rank=rank, **changes))).apply(block, None)
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(block).values():
        for key, value in layer.initial(layer.weight.detach().float(), generator).items():
            parameter = getattr(layer, key)
            parameter.data = value.to(device, args.dtype)  # FSDP2 gathers them in the compute dtype
    return block


def trained(block: nn.Module, args: argparse.Namespace) -> int:
    """Number of trained elements; HD-PiSSA's are leaves beside the parameters."""
    bound = [t for module in block.modules() for t in getattr(module, "bound", None) or ()]
    return sum(t.numel() for t in [*block.parameters(), *bound] if t.requires_grad)


def bench(args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    length = min(args.seq_len, args.tokens)
    shape = args.tokens // length, length, args.hidden
    x = torch.randn(shape, device=device, dtype=args.dtype, requires_grad=True)
    gy = torch.randn(shape, device=device, dtype=args.dtype)
    beside = inputs_beside(args, length, device)
    blocks = {name: build(args, name, device) for name in (*BASELINES, *ADAPTERS)}
    steps = {n: bench_linear.make_step(b, [x, *beside], gy, args.compile) for n, b in blocks.items()}
    results = bench_linear.measure(steps, args, device)
    return {name: {**result, "trained": trained(blocks[name], args)} for name, result in results.items()}


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    sizes = {"hidden": 512, "intermediate": 1408, "head-dim": 64, "seq-len": 512, "rank": 16, "tokens": 1024}
    for name, value in {**sizes, "threads": 1, "repetitions": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", choices=["llama", "rwkv6"], default="llama", help="whose block")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant (fullgraph)")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args, device = parse_args(), common.pick_device()
    torch.set_num_threads(args.threads)
    env = common.environment(device, args.threads)
    common.print_header("bench_methods", env)
    results = bench(args, device)
    sizes = f"{args.hidden} / {args.intermediate}, r {args.rank}, {args.tokens} tokens, {args.dtype}"
    print(f"\n{args.model}: block {sizes}\n")
    rows = [
        [
            name,
            f"{r['trained']:,}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_fastest']:.2f}",
            f"{r['ratio_cpu']:.2f}",
            None if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
        ]
        for name, r in results.items()
    ]
    common.print_table(["method", "trained", "times frozen", "fastest runs", "CPU time", "peak extra MiB"], rows)
    common.print_json("methods", env, {"settings": {**vars(args), "dtype": str(args.dtype)}, "block": results})


if __name__ == "__main__":
    main()
