"""A whole optimizer step, side by side with transformers and peft: one model, one batch, one precision.

    python -m benchmarks.bench_peers                                   # SmolLM2-135M, 4 micro-batches of 512 tokens
    python -m benchmarks.bench_peers --labelled 0.3 --rounds 5         # 30% of the tokens trained, as instructions have
    python -m benchmarks.bench_peers --flavor llama3/1B --dtype bfloat16        # on a GPU

    peft lora           transformers' Llama, peft's LoRA on all linear layers, torch's AdamW
    transformers full   transformers' Llama, every weight trained by torch's AdamW
    authors             HD-PiSSA as its authors wrote it, on transformers' Llama: y = x W^T + g s (x A^T) B^T by
                        autograd, Adam on every adapter, and the dense sum of all K adapters' updates added to W. In
                        this one process the K adapters take turns, and the sum is formed once, not by every worker.
    lora, hdpissa, full titan_hd's trainer: data, step, fold, everything that a run does but logging

Each is a process of its own with --threads threads; they take turns, step by step, in an order that rotates, so that
what else the machine does meets all alike. Seconds are of processor time on a CPU (of the clock on a GPU), medians over
the rounds; ratios are medians over the rounds of two steps of one round. Memory is the most that the process held
during its steps, less what it held before it had a model. With --profile each takes one step more under torch.profiler:
the share of its time in matrix products and attention, which is what all have to compute.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import common
from titan_hd.config.command_line import ToolParser

PEERS = ["peft lora", "transformers full", "authors"]
OURS = ["lora", "hdpissa", "full"]
# (ours, theirs) -> at most, as wanted before it was measured
WANTED = {("lora", "peft lora"): 0.95, ("hdpissa", "lora"): 0.97, ("full", "transformers full"): 1.00}
LR = 1e-5
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")


# ---------------------------------------------------------------------------------------------------------------------
# Steps. Each builder returns a function that takes one whole optimizer step and returns its loss.


def ours(method: str, args: argparse.Namespace) -> Callable[[], float]:
    from benchmarks.trained import build_trainer, init_workers

    init_workers()
    options = {
        "adapter.method": method,
        "adapter.rank": args.rank,
        "adapter.svd": "randomized",
        "adapter.svd_niter": 1,  # random weights have no directions worth more
        "hdpissa.num_adapters": args.micro_batches if method == "hdpissa" else None,
        "training.mixed_precision_param": args.dtype,
        "optimizer.lr": LR,
    }
    argv = [f"--{key}={value}" for key, value in options.items() if value is not None]
    steps = args.rounds + 2
    trainer = build_trainer(args.flavor, args.tokens, 1, args.micro_batches, args.labelled, steps, argv)
    return lambda: trainer.train_step().loss


class AuthorsLinear(nn.Module):
    """A frozen linear layer with K adapters, of which `active` computes."""

    def __init__(self, linear: nn.Linear, adapters: int, rank: int):
        super().__init__()
        self.linear, self.active, self.mute = linear, 0, 1e-16
        out, into = linear.weight.shape
        device, std = linear.weight.device, into**-0.5
        self.a = nn.ParameterList(std * torch.randn(rank, into, device=device) for _ in range(adapters))
        self.b = nn.ParameterList(std * torch.randn(out, rank, device=device) for _ in range(adapters))
        self.first = [[p.detach().clone() for p in group] for group in (self.a, self.b)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a[self.active].to(x.dtype), self.b[self.active].to(x.dtype)
        return self.linear(x) + self.mute * ((x @ a.T) @ b.T)

    @torch.no_grad()
    def fold(self) -> None:
        """W += mean_i (B_i A_i - B_i' A_i'), dense; the adapters go back to where they were."""
        change = torch.zeros_like(self.linear.weight, dtype=torch.float32)
        for a, b, a0, b0 in zip(self.a, self.b, *self.first):
            change += b @ a - b0 @ a0
            a.copy_(a0)
            b.copy_(b0)
        self.linear.weight.add_(change / len(self.a))


def theirs(name: str, args: argparse.Namespace) -> Callable[[], float]:
    """transformers computes in args.dtype; what is trained is fp32 (full: under autocast, with fp32 weights)."""
    import peft
    import transformers

    from titan_hd.models.flavors import FLAVORS

    family, size = args.flavor.split("/")
    device, dtype = common.pick_device(), getattr(torch, args.dtype)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**FLAVORS[family][size])
    with device:
        model = transformers.LlamaForCausalLM(config)
        ids = torch.randint(config.vocab_size, (args.micro_batches, 1, args.tokens))
    folding: list[AuthorsLinear] = []
    if name != "transformers full":
        model.requires_grad_(False).to(dtype)
    if name == "peft lora":
        settings = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=True)
    elif name == "authors":
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for key, linear in [*parent.named_children()]:
                    if isinstance(linear, nn.Linear):
                        folding.append(AuthorsLinear(linear, args.micro_batches, args.rank))
                        setattr(parent, key, folding[-1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, weight_decay=0.0, fused=True)
    labels = ids.clone()
    labels[..., : round(args.tokens * (1 - args.labelled))] = -100

    def step() -> float:
        total = torch.zeros((), device=device)
        for m, (row, target) in enumerate(zip(ids, labels)):
            for layer in folding:
                layer.active = m
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=row, labels=target, use_cache=False).loss
            (loss if folding else loss / args.micro_batches).backward()
            total += loss.detach()
        for layer in folding:  # undo the mute scalar
            for p in layer.a, layer.b:
                torch._foreach_div_([q.grad for q in p], layer.mute)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for layer in folding:
            layer.fold()
        return (total / args.micro_batches).item()

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def serve(args: argparse.Namespace) -> None:
    """One arm: a step for every line that comes, its figures as a line of JSON."""
    torch.set_num_threads(args.threads)
    device = common.pick_device()
    libraries = ["benchmarks.trained"] if args.arm in OURS else ["peft", "transformers.models.llama.modeling_llama"]
    for library in libraries:
        importlib.import_module(library)
    before = common.held_bytes(device)
    step = ours(args.arm, args) if args.arm in OURS else theirs(args.arm, args)
    common.reset_peak(device)
    for line in sys.stdin:
        if line.strip() == "profile":
            print("RESULT " + json.dumps({"products": products_share(step)}), flush=True)
            continue
        common.synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        common.synchronize(device)
        result: dict[str, float | None] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        result["loss"] = loss
        peak = common.peak_bytes(device)
        result["peak_mib"] = None if peak is None or before is None else (peak - before) / 2**20
        print("RESULT " + json.dumps(result), flush=True)


def products_share(step: Callable[[], object]) -> float:
    """Share of a step's time in matrix products and attention: on the host, or of the kernels' time on a GPU."""
    with torch.profiler.profile() as profiler:
        step()
    total = products = 0.0
    for event in profiler.key_averages():
        spent = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        total += spent
        products += spent if event.key.startswith(PRODUCTS) else 0.0
    return products / total


class Arm:
    """The other end of `serve`."""

    def __init__(self, name: str):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_peers", *sys.argv[1:], "--arm", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, how: str = "") -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(how + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[7:])
        raise SystemExit(f"bench_peers: a process ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """arm -> figure -> its value in every round. The first round warms up, and is not counted."""
    arms = {name: Arm(name) for name in args.arms}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    try:
        for number in range(args.rounds + 1):
            shift = number % len(args.arms)
            for name in args.arms[shift:] + args.arms[:shift]:
                result = arms[name].step()
                if number:
                    rounds[name].append(result)
        for name in args.arms if args.profile else ():
            share = arms[name].step("profile")["products"]
            print(f"{name}: {share:.1%} of a step in matrix products and attention", flush=True)
    finally:
        for arm in arms.values():
            arm.close()
    return {name: {key: [r[key] for r in results] for key in results[0]} for name, results in rounds.items()}


def report(figures: dict[str, dict[str, list[float]]], clock: str) -> dict[str, float]:
    """Print both tables; the ratios by name."""
    seconds = {name: f[clock] for name, f in figures.items()}
    peaks = {name: f["peak_mib"][-1] for name, f in figures.items()}
    rows = [
        [name, f"{statistics.median(s):.2f}", f"{min(s):.2f}", f"{max(s):.2f}", peaks[name] and f"{peaks[name]:.0f}"]
        for name, s in seconds.items()
    ]
    common.print_table([f"step ({clock} seconds)", "median", "least", "most", "peak MiB"], rows)
    ratios, rows = {}, []
    pairs = {**WANTED, ("hdpissa", "peft lora"): None, ("hdpissa", "authors"): None}
    for (name, base), wanted in pairs.items():
        if name in seconds and base in seconds:
            ratios[f"{name} / {base}"] = ratio = common.median_ratio(seconds, name, base)
            memory = f"{peaks[name] / peaks[base]:.2f}" if peaks[name] and peaks[base] else None
            rows.append([f"{name} / {base}", f"{ratio:.3f}", wanted and f"{wanted:.2f}", memory])
    if rows:
        common.print_table(["ratio", "seconds", "wanted at most", "memory"], rows)
    return ratios


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--flavor", default="smollm2/135M", help="a family and size with random weights (Llama alone)")
    for name, value in {"tokens": 512, "micro-batches": 4, "rank": 16, "rounds": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--labelled", type=float, default=1.0, help="share of the tokens that are trained")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[*PEERS, *OURS], help="comma-separated")
    parser.add_argument("--profile", action="store_true", help="one step more of each, under torch.profiler")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # of the processes that this one starts
    args = parser.parse_args()
    unknown = [name for name in args.arms if name not in PEERS + OURS]
    if unknown:
        parser.error(f"--arms: {unknown[0]!r} is none of {', '.join(PEERS + OURS)}")
    return args


def main() -> None:
    args = parse_args()
    if args.arm:
        serve(args)
        return
    device = common.pick_device()
    env = common.environment(device, args.threads)
    common.print_header("bench_peers", env)
    figures = measure(args)
    clock = "cpu" if device.type == "cpu" else "wall"
    size = f"{args.micro_batches} micro-batches of {args.tokens} tokens, {args.labelled:.0%} labelled"
    print(f"\n{args.flavor}, {size}, {args.dtype}, r = {args.rank}, {args.rounds} rounds\n")
    ratios = report(figures, clock)
    common.print_json("peers", env, {"settings": vars(args), "figures": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
