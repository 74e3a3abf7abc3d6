"""The head and the loss of one micro-batch, forward and backward: time and peak memory.

    python -m benchmarks.bench_loss                                     # CPU: SmolLM2's head, 2,048 tokens, fp32
    python -m benchmarks.bench_loss --tokens 16384 --hidden 4096 --vocabulary 128256 --dtype bfloat16     # one GPU

Variants, on the same hidden states, frozen head and targets:

    whole         logits of every position, then cross entropy in fp32: what every plain model does
    torch         torch.nn.functional.linear_cross_entropy in chunks (torch 2.13)
    ours          models.head: chunks of 1,024 positions that have a label

each with all positions labelled, and with the share --labelled of them, as instruction data have. "bytes" is the peak
of what one call allocates, over tokens and vocabulary. Expected: ours as fast as whole where all is labelled, and in
proportion to the labelled share elsewhere; memory below 1.5 bytes x vocabulary per token from 16k tokens on (12 whole).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import common
from titan_hd.config.command_line import ToolParser
from titan_hd.models.head import IGNORE_INDEX, Targets, logits_or_loss


def variants(args: argparse.Namespace, labelled: float, device: torch.device) -> dict[str, Callable[[], None]]:
    dtype, generator = getattr(torch, args.dtype), torch.Generator().manual_seed(0)
    h = torch.randn(1, args.tokens, args.hidden, generator=generator).to(device, dtype).requires_grad_(True)
    weight = torch.randn(args.vocabulary, args.hidden, generator=generator).to(device, dtype) / args.hidden**0.5
    targets = torch.randint(0, args.vocabulary, (1, args.tokens), generator=generator)
    targets[torch.rand(1, args.tokens, generator=generator) >= labelled] = IGNORE_INDEX
    # As the loader has them: found on the host, once for each batch.
    positions, flat = Targets(*(t.to(device) for t in Targets.of(targets))), targets.flatten().to(device)

    def run(loss: Callable[[], torch.Tensor]) -> None:
        h.grad = None
        (loss() / len(positions.labels)).backward()

    def whole() -> torch.Tensor:
        return F.cross_entropy(F.linear(h, weight).flatten(0, 1).float(), flat, reduction="sum")

    losses = {"whole": whole, "ours": lambda: logits_or_loss(h, weight, positions)}
    library = getattr(F, "linear_cross_entropy", None)
    if library is not None:
        options = torch.nn.LinearCrossEntropyOptions()
        losses["torch"] = lambda: library(h[0], weight, flat, reduction="sum", options=options)
    values = [loss().item() for loss in losses.values()]
    assert max(values) - min(values) < 1e-4 * max(values), values
    return {name: functools.partial(run, loss) for name, loss in losses.items()}


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--labelled", type=float, default=0.3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = common.pick_device()
    env = common.environment(device, args.threads)
    common.print_header(f"head and loss, {args.tokens} tokens, {args.hidden} x {args.vocabulary}, {args.dtype}", env)
    rows, results = [], {}
    for labelled in (1.0, args.labelled):
        calls = variants(args, labelled, device)
        timing = common.interleave(calls, device, args.repetitions)
        seconds = timing.wall if device.type == "cuda" else timing.cpu
        for name, call in calls.items():
            peak = common.peak_extra_bytes(call, device) / (args.tokens * args.vocabulary)
            ratio = common.median_ratio(seconds, name, "whole")
            results[f"{name}, {labelled:.0%}"] = {
                "seconds": common.medians(seconds)[name],
                "ratio": ratio,
                "bytes": peak,
            }
            rows.append([name, f"{labelled:.0%}", common.medians(seconds)[name], ratio, peak])
    common.print_table(["variant", "labelled", "seconds", "over whole", "bytes"], rows)
    common.print_json("loss", env, results)


if __name__ == "__main__":
    main()
