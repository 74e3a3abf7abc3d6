"""Forward + backward of one adapted linear layer, and of one transformer block with all seven layers adapted.

    python -m benchmarks.bench_linear                                   # CPU: 2048 x 2048, r 16, 2048 tokens, fp32
    python -m benchmarks.bench_linear --dtype bfloat16 --in-features 4096 --out-features 14336 \
        --hidden 4096 --intermediate 14336 --head-dim 128               # one GPU

Variants, all on the same weights and inputs, all returning dx:

    frozen        y = x W^T, no adapter: the floor
    exact mute    titan_hd's HDPissaLinear: the frozen forward pass, two skinny products for dA and two for dB;
                  in a block q, k, v and gate, up share their products with the input and sum dx in place
    not shared    (block) the same, every layer by itself
    lora          y = x W^T + (x A^T) B^T, plain autograd
    full          dW is computed
    dense mute    y = x (W + g B A)^T, the sum formed in every forward pass, plain autograd (the paper's equation)
    two products  y = x W^T + g x (B A)^T, plain autograd (B A formed in every forward pass, and multiplied by itself)

Ratios are medians over interleaved repetitions of (variant / frozen in the same repetition); "fastest runs" is the
fastest repetition over frozen's fastest; "CPU time" is the first ratio in processor time instead of elapsed time, which
other programs on a busy machine disturb least. Expected, from a prototype of the linear
layer (fp32, the defaults): exact mute 1.03 times frozen, lora 1.07, full 1.50 (three large products instead of two),
the dense forms up to 2.59.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from titan_hd.adapters.hdpissa import HDPissaLinear, project_together
from titan_hd.adapters.shared_products import let_share
from titan_hd.config.command_line import ToolParser
from titan_hd.models.decoder import Block
from titan_hd.models.decoder_config import DecoderConfig
from titan_hd.models.registry import flavor_config
from titan_hd.models.rope import RotaryEmbedding

MUTE = 1e-16
EXPECTED = {"exact mute": 1.03, "lora": 1.07, "full": 1.50, "dense mute": 2.59, "two products": 2.59}


class Adapted(nn.Linear):
    """A frozen linear layer with trainable fp32 A [r, in], B [out, r], as the baselines have them."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


class Lora(Adapted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low_rank = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + low_rank


class DenseMute(Adapted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + (MUTE * (self.b @ self.a)).to(x.dtype), self.bias)


class TwoProducts(Adapted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + MUTE * F.linear(x, (self.b @ self.a).to(x.dtype))


def exact_mute(linear: nn.Linear, a: torch.Tensor, b: torch.Tensor) -> HDPissaLinear:
    layer = HDPissaLinear(linear, scale=1.0, dropout=0.0, mute_scalar=0.0)
    deltas = [torch.zeros_like(t).requires_grad_(True) for t in (a, b)]
    layer.bind(a, b, *deltas)
    return layer


def full(linear: nn.Linear, a: torch.Tensor, b: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(linear.weight.detach())
    return layer


VARIANTS: dict[str, Callable[..., nn.Linear]] = {
    "frozen": lambda linear, a, b: linear,
    "exact mute": exact_mute,
    "not shared": exact_mute,
    "lora": Lora,
    "full": full,
    "dense mute": DenseMute,
    "two products": TwoProducts,
}


def adapt(linear: nn.Linear, variant: str, rank: int) -> nn.Linear:
    """The layer as a variant has it, on the same W."""
    device = linear.weight.device
    a = torch.randn(rank, linear.in_features, device=device) / linear.in_features**0.5
    b = torch.randn(linear.out_features, rank, device=device) / linear.out_features**0.5
    return VARIANTS[variant](linear, a, b)


def build_linear(args: argparse.Namespace, variant: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(args.in_features, args.out_features, bias=False, device=device, dtype=args.dtype)
    return adapt(linear.requires_grad_(False), variant, args.rank)


def block_config(args: argparse.Namespace) -> DecoderConfig:
    heads = args.hidden // args.head_dim
    config = flavor_config("llama3", "8B")
    assert isinstance(config, DecoderConfig)
    return dataclasses.replace(
        config,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=args.head_dim,
    )


def build_block(args: argparse.Namespace, variant: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        block = Block(block_config(args)).to(args.dtype)
    return adapt_block(block, variant, args.rank)


def adapt_block(block: nn.Module, variant: str, rank: int) -> nn.Module:
    """A block whose linear layers are as a variant has them; the rest is frozen."""
    block.requires_grad_(False)
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            block.set_submodule(name, adapt(linear, variant, rank))
    if variant == "exact mute":
        let_share(block, project_together)
    return block


def make_step(module: nn.Module, inputs: list[torch.Tensor | None], gradient: torch.Tensor, compiled: bool):
    """One forward and backward pass. Gradients start from none, as after zero_grad."""
    forward = torch.compile(module.forward, fullgraph=True) if compiled else module.forward
    leaves = [*(t for t in inputs if t is not None), *module.parameters()]
    for layer in module.modules():
        leaves += getattr(layer, "bound", None) or ()

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(*inputs).backward(gradient)

    return step


def measure(steps: dict[str, Callable], args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    calls = 10 if device.type == "cuda" else 1
    timing = common.interleave(steps, device, args.repetitions, warmup=2, calls=calls)
    wall = timing.wall
    # torch.compile would trace the byte counter
    count = device.type == "cuda" or not args.compile
    return {
        name: {
            "ms": common.medians(wall)[name] * 1e3,
            "ratio": common.median_ratio(wall, name, "frozen"),
            "ratio_fastest": min(wall[name]) / min(wall["frozen"]),
            "ratio_cpu": common.median_ratio(timing.cpu, name, "frozen"),
            "peak_mib": common.peak_extra_bytes(step, device) / 2**20 if count else None,
        }
        for name, step in steps.items()
    }


def bench_linear(args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    x = torch.randn(args.tokens, args.in_features, device=device, dtype=args.dtype, requires_grad=True)
    gy = torch.randn(args.tokens, args.out_features, device=device, dtype=args.dtype)
    modules = {name: build_linear(args, name, device) for name in VARIANTS if name != "not shared"}
    return measure({n: make_step(m, [x], gy, args.compile) for n, m in modules.items()}, args, device)


def bench_block(args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    length = min(args.seq_len, args.tokens)
    shape = args.tokens // length, length, args.hidden
    x = torch.randn(shape, device=device, dtype=args.dtype, requires_grad=True)
    gy = torch.randn(shape, device=device, dtype=args.dtype)
    rope = RotaryEmbedding(block_config(args)).to(device)
    cos, sin = rope(torch.arange(length, device=device)[None], args.dtype)
    modules = {name: build_block(args, name, device) for name in VARIANTS}
    steps = {n: make_step(m, [x, cos, sin, None], gy, args.compile) for n, m in modules.items()}
    return measure(steps, args, device)


def report(title: str, results: dict[str, dict], expected: dict[str, float]) -> None:
    print(f"\n{title}\n")
    rows = [
        [
            name,
            f"{r['ms']:.2f}",
            f"{r['ratio']:.3f}",
            f"{r['ratio_fastest']:.3f}",
            f"{r['ratio_cpu']:.3f}",
            expected.get(name),
            None if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
        ]
        for name, r in results.items()
    ]
    common.print_table(
        ["variant", "ms", "times frozen", "fastest runs", "CPU time", "expected", "peak extra MiB"], rows
    )
    ours, lora = results["exact mute"]["ratio"], results["lora"]["ratio"]
    print(f"exact mute: {ours:.3f} times frozen, {'at or under' if ours <= lora else 'OVER'} lora's {lora:.3f}")
    if expected:
        verdict = "at or under" if ours <= expected["exact mute"] + 0.005 else "OVER"
        print(f"exact mute: {verdict} the expected {expected['exact mute']}")


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    for name, value in {"in-features": 2048, "out-features": 2048, "rank": 16, "tokens": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"hidden": 1024, "intermediate": 2816, "head-dim": 64, "seq-len": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of the transformer block")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of W and x; A, B are fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant (fullgraph)")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args, device = parse_args(), common.pick_device()
    torch.set_num_threads(args.threads)
    env = common.environment(device, args.threads)
    common.print_header("bench_linear", env)
    suffix = f"r {args.rank}, {args.tokens} tokens, {args.dtype}{', compiled' if args.compile else ''}"
    linear = bench_linear(args, device)
    prototype = (args.in_features, args.out_features, args.rank, args.tokens) == (2048, 2048, 16, 2048)
    report(f"linear {args.in_features} -> {args.out_features}, {suffix}", linear, EXPECTED if prototype else {})
    block = bench_block(args, device)
    title = f"block {args.hidden} / {args.intermediate}, sequences of {min(args.seq_len, args.tokens)}, {suffix}"
    report(title, block, {})
    settings = {**vars(args), "dtype": str(args.dtype)}
    common.print_json("linear", env, {"settings": settings, "linear": linear, "block": block})


if __name__ == "__main__":
    main()
