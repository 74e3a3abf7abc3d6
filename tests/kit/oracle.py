"""HD-PiSSA from its equations: float64, one process, dense gradients, no muting, no sharding, no titan_hd code.

Each logical adapter i has its own part of the global batch (or, with samples = "all", all of it), the dense gradient
G_i of the token-mean loss of that, and

    grad(dB_i) = s G_i A_i^T,   grad(dA_i) = s B_i^T G_i          (s = alpha / r)

which its own AdamW turns into dA_i and dB_i. Then W <- W + c sum_i [(B_i + dB_i)(A_i + dA_i) - B_i A_i]. Every
refresh_steps steps A_i and B_i are taken from the W of that time, and AdamW begins anew. With max_norm the gradients of
a step, of all adapters together, are scaled down to that norm where theirs is larger.

With exchange_dtype = "int8" each row of dA_i and column of dB_i, plus what the fold before has left of it, is rounded
to multiples of a 127th of its largest magnitude; the difference is left for the next fold with these A_i and B_i.

With local_steps = L > 1 W changes after every L steps and after the last one. In between adapter i has a model of its
own, W + (B_i + dB_i)(A_i + dA_i) - B_i A_i; G_i is taken there, grad(dB_i) = s G_i (A_i + dA_i)^T and
grad(dA_i) = s (B_i + dB_i)^T G_i, and AdamW adds to dA_i and dB_i. Each step's weight decay is of the W that stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def forward(weights: dict[str, torch.Tensor], config: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of one sequence of token ids [T], from the Llama equations in plain loops over heads."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, eps = config["head_dim"], config["rms_norm_eps"]
    length = len(ids)
    frequency = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def rotate(x):
        return x * cos + torch.cat([-x[:, width // 2 :], x[:, : width // 2]], -1) * sin

    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        x = norm(h, w["input_layernorm.weight"])
        q, k, v = (x @ w[f"self_attn.{n}_proj.weight"].T for n in "qkv")
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            qh = rotate(q[:, head * width : (head + 1) * width])
            kh = rotate(k[:, group * width : (group + 1) * width])
            scores = (qh @ kh.T / math.sqrt(width)).masked_fill(future, -torch.inf)
            out.append(scores.softmax(-1) @ v[:, group * width : (group + 1) * width])
        h = h + torch.cat(out, -1) @ w["self_attn.o_proj.weight"].T
        x = norm(h, w["post_attention_layernorm.weight"])
        gate, up = (x @ w[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        h = h + (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T
    h = norm(h, weights["model.norm.weight"])
    return h @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def token_mean_gradients(
    weights: dict[str, torch.Tensor], config: dict, records: list[dict], names: list[str]
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Dense gradients of (sum of token losses / number of labels) over records; also the sum and the number."""
    leaves = {n: w.detach().requires_grad_(n in names) for n, w in weights.items()}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for record in records:
        logits = forward(leaves, config, torch.tensor(record["input_ids"]))
        labels = torch.tensor(record["labels"][1:])
        total = total + F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    gradients = torch.autograd.grad(total / count, [leaves[n] for n in names])
    return dict(zip(names, gradients)), total.item(), count


class Adam:
    """AdamW's update of one tensor that is zero when the step begins, so that weight decay has nothing to decay."""

    def __init__(self, beta1: float, beta2: float, eps: float):
        self.beta1, self.beta2, self.eps, self.t, self.m, self.v = beta1, beta2, eps, 0, 0.0, 0.0

    def update(self, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return -lr * m / (v.sqrt() + self.eps)


def in_127_steps(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Rounded to multiples of a 127th of the largest magnitude along dim."""
    scale = x.abs().amax(dim, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


@dataclass
class Settings:
    """What the reference run needs to know; `lrs` has the learning rate of every step."""

    num_adapters: int
    rank: int
    global_batch_size: int
    lrs: list[float]
    aggregate: str = "mean"
    slices: str = "orthogonal"
    factor_scale: str = "root"
    samples: str = "own"
    max_norm: float = 0.0
    refresh_steps: int = 0
    local_steps: int = 1
    exchange_dtype: str = "float32"
    alpha: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    targets: tuple[str, ...] = LINEARS


def fixed_factors(
    weights: dict[str, torch.Tensor], names: list[str], settings: Settings
) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """A_i [r, in] and B_i [out, r] of every weight and adapter. "unit": of length one, times the mean root of the
    singular values of all directions that some adapter has."""
    s, factors = settings, {}
    for n in names:
        u, sigma, vh = torch.linalg.svd(weights[n], full_matrices=False)
        if s.slices == "minor":
            u, sigma, vh = u.flip(1), sigma.flip(0), vh.flip(0)
        mean = sigma[: s.rank if s.slices == "top" else s.num_adapters * s.rank].sqrt().mean()
        for i in range(s.num_adapters):
            first = 0 if s.slices == "top" else i * s.rank
            part = slice(first, first + s.rank)
            root = sigma[part].sqrt() if s.factor_scale == "root" else mean.expand(s.rank)
            factors[n, i] = root[:, None] * vh[part], u[:, part] * root
    return factors


def train(
    weights: dict[str, torch.Tensor], config: dict, records: list[dict], settings: Settings
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after len(lrs) steps over records in their order (wrapping round), and the loss of every step."""
    s = settings
    weights = {n: w.double().clone() for n, w in weights.items()}
    names = [n for n in weights if n.split(".")[-2] in s.targets]
    shares = s.num_adapters if s.samples == "own" else 1  # of the batch; with "all" every adapter has the one
    scale, share = (s.alpha or s.rank) / s.rank, s.global_batch_size // shares
    c, losses = 1.0 / shares if s.aggregate == "mean" else 1.0, []
    rates = 0.0  # sum since the last fold
    for step, lr in enumerate(s.lrs):
        if step % (s.refresh_steps or len(s.lrs)) == 0:
            factors = fixed_factors(weights, names, s)
            adams = {(n, i, x): Adam(*s.betas, s.eps) for n, i in factors for x in "AB"}
            deltas = {(n, i): (torch.zeros_like(a), torch.zeros_like(b)) for (n, i), (a, b) in factors.items()}
        rates, total, labels, slopes = rates + lr, 0.0, 0, {}
        for i in range(s.num_adapters):
            # The parameters of the model that adapter i sees: A_i + dA_i and B_i + dB_i where it has one of its own.
            seen = {
                n: tuple(map(sum, zip(factors[n, i], deltas[n, i]))) if s.local_steps > 1 else factors[n, i]
                for n in names
            }
            if i < shares:
                first = step * s.global_batch_size + i * share
                part = [records[j % len(records)] for j in range(first, first + share)]
                own = {n: weights[n] + seen[n][1] @ seen[n][0] - factors[n, i][1] @ factors[n, i][0] for n in names}
                gradients, loss, count = token_mean_gradients({**weights, **own}, config, part, names)
                total, labels = total + loss, labels + count
            for n in names:
                a, b = seen[n]
                slopes[n, i, "A"], slopes[n, i, "B"] = scale * b.T @ gradients[n], scale * gradients[n] @ a.T
        norm = math.sqrt(sum(slope.square().sum().item() for slope in slopes.values()))
        clip = min(1.0, s.max_norm / norm) if s.max_norm else 1.0
        for n, i in factors:
            moved = (adams[n, i, x].update(clip * slopes[n, i, x], lr) for x in "AB")
            deltas[n, i] = tuple(map(sum, zip(deltas[n, i], moved)))
        losses.append(total / labels)
        if (step + 1) % s.local_steps == 0 or step + 1 == len(s.lrs):
            for n in names:
                weights[n] = (1 - rates * s.weight_decay) * weights[n]
            for (n, i), (a, b) in factors.items():
                da, db = folded = deltas[n, i]
                if s.exchange_dtype == "int8":
                    da, db = in_127_steps(folded[0], 1), in_127_steps(folded[1], 0)
                weights[n] += c * ((b + db) @ (a + da) - b @ a)
                deltas[n, i] = folded[0] - da, folded[1] - db
            rates = 0.0
    return weights, losses
