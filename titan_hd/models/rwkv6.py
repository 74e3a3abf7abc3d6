"""RWKV-6 ("Finch"): plain modules in the layout and under the names of its Hugging Face files (`Rwkv6ForCausalLM`).

A block mixes each token with the one before it, in shares that depend on the token, and remembers in a state of one
size (`wkv6`). There is no attention, and there are no positions. Shapes: B sequences, T tokens, D hidden, H heads of K
channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.errors import UserError
from titan_hd.models.config_values import flag_of, number_of, refuse_unsupported, size_of
from titan_hd.models.decoder import Embedding
from titan_hd.models.head import Head, Targets
from titan_hd.models.model import Model, ModelBlock
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.recompute import in_turn, recompute_first
from titan_hd.models.wkv6 import wkv6, wkv6_with_state

ARCHITECTURE, MODEL_TYPE = "Rwkv6ForCausalLM", "rwkv6"
MIXED = "wkvrg"  # decay, key, value, receptance, gate: in the order of their rows in time_maa_w1 and time_maa_w2

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_version": ("6_0", None),
    "tie_word_embeddings": (False, None),
    "quantization_config": (None, {}),
    "hidden_act": ("sqrelu", None),
}
_READ = {
    *(*_SIZES, *_UNSUPPORTED, "architectures", "model_type", "head_size", "head_size_divisor", "intermediate_size"),
    *("attention_hidden_size", "layer_norm_epsilon", "time_mix_extra_dim", "time_decay_extra_dim"),
}
_HARMLESS = {
    *("transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map", "use_cache", "bos_token_id"),
    *("eos_token_id", "pad_token_id", "initializer_range", "output_attentions", "output_hidden_states", "return_dict"),
    "rescale_every",  # halves the stream of fp16 inference; the product is the same
    "num_attention_heads",  # says nothing: heads are hidden_size / head_size
    *("context_length", "max_context_length", "max_position_embeddings"),  # the state knows no length
}
_MOST_LAYERS = 1_000
_LARGEST_WEIGHT = 2**40  # elements


@dataclass(frozen=True)
class Rwkv6Config(ModelConfig):
    """Sizes of an RWKV-6, in HF's names.

    time_mix_extra_dim, time_decay_extra_dim: ranks of the low-rank maps that make a token's shares and its decay.
    head_norm_eps: of the norm of each head's result.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    head_size: int
    time_mix_extra_dim: int
    time_decay_extra_dim: int
    layer_norm_epsilon: float
    head_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    ignored: tuple[str, ...] = field(repr=False, compare=False)
    hf: dict[str, Any] = field(repr=False, compare=False)

    attention_free: ClassVar[bool] = True
    blocks_name: ClassVar[str] = "rwkv.blocks"

    @property
    def heads(self) -> int:
        return self.hidden_size // self.head_size

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path in a block -> (out, in)."""
        d, ffn = self.hidden_size, self.intermediate_size
        names = ("receptance", "key", "value", "gate", "output")
        return {
            **{f"attention.{name}": (d, d) for name in names},
            "feed_forward.key": (ffn, d),
            "feed_forward.receptance": (d, d),
            "feed_forward.value": (d, ffn),
        }

    def mixing_flops(self, length: float) -> float:
        """Of the recurrence, token by token: the state is read and written once, whatever the length; and of the
        low-rank maps."""
        d = self.hidden_size
        maps = 2 * d * (2 * len(MIXED) * self.time_mix_extra_dim + 2 * self.time_decay_extra_dim)
        return self.num_hidden_layers * (6 * d * self.head_size + maps)


def parse_rwkv6(raw: dict[str, Any], where: str) -> Rwkv6Config:
    """Turn the keys of a config.json into an Rwkv6Config.

    Raises:
        UserError: a key that is wrong, or that the model has not, by name; `where` stands in front.
    """
    refuse_unsupported(raw, _UNSUPPORTED, where)
    flag_of(raw, "tie_word_embeddings", where)
    sizes = {key: size_of(raw, key, where) for key in _SIZES}
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers: must be at most {_MOST_LAYERS}")
    hidden, head = sizes["hidden_size"], size_of(raw, "head_size", where, 64)
    if hidden % head:
        raise UserError(f"{where}: head_size: must divide hidden_size ({hidden}), not {head}")
    if size_of(raw, "attention_hidden_size", where, hidden) != hidden:
        raise UserError(f"{where}: attention_hidden_size: only hidden_size ({hidden}) is supported")
    intermediate = size_of(raw, "intermediate_size", where, max(32, int(hidden * 3.5) // 32 * 32))
    if max(sizes["vocab_size"], intermediate, hidden) * hidden > _LARGEST_WEIGHT:
        raise UserError(f"{where}: hidden_size: a weight of more than {_LARGEST_WEIGHT} elements is no model's")
    large = hidden == 4096  # the 7B model, as the Hub's own code has it
    return Rwkv6Config(
        **sizes,
        intermediate_size=intermediate,
        head_size=head,
        time_mix_extra_dim=size_of(raw, "time_mix_extra_dim", where, 64 if large else 32),
        time_decay_extra_dim=size_of(raw, "time_decay_extra_dim", where, 128 if large else 64),
        layer_norm_epsilon=number_of(raw, "layer_norm_epsilon", where, 1e-5),
        head_norm_eps=1e-5 * number_of(raw, "head_size_divisor", where, 8) ** 2,
        max_position_embeddings=2**20,
        tie_word_embeddings=False,
        ignored=tuple(sorted(key for key, value in raw.items() if value and key not in _READ | _HARMLESS)),
        hf=raw,
    )


class LayerState:
    """What a layer keeps of the tokens so far: the last one in front of the time mix and of the channel mix, [B, D],
    and the state [B, H, K, K] in fp32. None before the first pass."""

    def __init__(self) -> None:
        self.time: torch.Tensor | None = None
        self.channel: torch.Tensor | None = None
        self.memory: torch.Tensor | None = None


class State:
    """What a generation keeps of the tokens so far; it does not grow with their number."""

    def __init__(self, layers: int):
        self.layers = [LayerState() for _ in range(layers)]

    def look_at(self, positions: int) -> None:
        """Everything that was is in the state, whatever the position."""

    def take(self, rows: torch.Tensor) -> None:
        """Keep these rows [B'] of the batch, in this order; one may be taken several times."""
        for layer in self.layers:
            for name, value in vars(layer).items():
                assert value is not None, "filled by a pass"
                setattr(layer, name, value[rows])


def previous_tokens(x: torch.Tensor, ends: torch.Tensor | None, first: torch.Tensor | None) -> torch.Tensor:
    """x [B, T, D] of the token before each one; zeros in front of a document. ends: [B, T], whether a token is the last
    of its document; first: [B, D], in front of the first token."""
    if ends is not None:
        x = x.masked_fill(ends[..., None], 0.0)
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    if first is None:
        return before
    return torch.cat((first[:, None].to(x.dtype), before[:, 1:]), 1)


def last_tokens(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """x [B, T, D] of the last of each row's `lengths` [B] tokens: [B, D]."""
    return x[torch.arange(len(x), device=x.device), lengths - 1]


class TimeMix(nn.Module):
    """HF's `attention`. `mix_then` and `linear_then` call two steps one after the other; activation checkpointing
    replaces them by `recompute_first`."""

    mix_then: Callable[..., torch.Tensor]
    linear_then: Callable[..., torch.Tensor]

    def __init__(self, config: Rwkv6Config):
        super().__init__()
        self.mix_then = self.linear_then = in_turn
        d, self.head_size = config.hidden_size, config.head_size
        self.time_maa_x, self.time_maa_w, self.time_maa_k = (nn.Parameter(torch.zeros(1, 1, d)) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (nn.Parameter(torch.zeros(1, 1, d)) for _ in range(3))
        self.time_maa_w1 = nn.Parameter(torch.zeros(d, len(MIXED) * config.time_mix_extra_dim))
        self.time_maa_w2 = nn.Parameter(torch.zeros(len(MIXED), config.time_mix_extra_dim, d))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, d))
        self.time_decay_w1 = nn.Parameter(torch.zeros(d, config.time_decay_extra_dim))
        self.time_decay_w2 = nn.Parameter(torch.zeros(config.time_decay_extra_dim, d))
        self.time_faaaa = nn.Parameter(torch.zeros(config.heads, config.head_size))
        self.receptance = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.ln_x = nn.GroupNorm(config.heads, d, eps=config.head_norm_eps)

    def forward(
        self, x: torch.Tensor, ends: torch.Tensor | None, state: LayerState | None, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        first = None if state is None else state.time
        if state is not None:
            assert lengths is not None
            state.time = last_tokens(x, lengths)
        return self.mix_then(self.mix, self.look_up, (x, ends, first), ends, state, lengths)

    def mix(self, x: torch.Tensor, ends: torch.Tensor | None, first: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Five mixtures [B, T, D] of each token with the one before it, in the order of `MIXED`."""
        step = previous_tokens(x, ends, first) - x
        ranks = torch.tanh((x + step * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (len(MIXED), -1))
        shares = torch.einsum("btmr,mrd->mbtd", ranks, self.time_maa_w2)
        fixed = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        return tuple(x + step * (always + share) for always, share in zip(fixed, shares))

    def look_up(self, *args: Any) -> torch.Tensor:
        mixed, rest = args[: len(MIXED)], args[len(MIXED) :]
        return self.output(self.linear_then(self.linears, self.remember, mixed, *rest))

    def linears(self, *mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Receptance, key, value, gate and decay [B, T, D] of the mixtures."""
        w, k, v, r, g = mixed
        decay = self.time_decay + torch.tanh(w @ self.time_decay_w1) @ self.time_decay_w2
        return self.receptance(r), self.key(k), self.value(v), self.gate(g), decay

    def remember(
        self,
        r: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        decay: torch.Tensor,
        ends: torch.Tensor | None,
        state: LayerState | None,
        lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        """The heads' results [B, T, D], each normed by itself, and gated."""
        heads = [t.unflatten(-1, (-1, self.head_size)) for t in (r, k, v, decay)]
        if state is None:
            y = wkv6(*heads, bonus=self.time_faaaa, ends=ends)
        else:
            assert lengths is not None
            y, state.memory = wkv6_with_state(*heads, bonus=self.time_faaaa, state=state.memory, lengths=lengths)
        norm = self.ln_x
        weight, bias = norm.weight.to(y.dtype), norm.bias.to(y.dtype)
        normed = F.group_norm(y.flatten(2).flatten(0, 1), norm.num_groups, weight, bias, norm.eps).view_as(r)
        return normed.to(r.dtype) * F.silu(gate)


class ChannelMix(nn.Module):
    """HF's `feed_forward`; `mix_then` and the others as in `TimeMix`."""

    mix_then: Callable[..., torch.Tensor]
    linear_then: Callable[..., torch.Tensor]
    activate_then: Callable[..., torch.Tensor]

    def __init__(self, config: Rwkv6Config):
        super().__init__()
        self.mix_then = self.linear_then = self.activate_then = in_turn
        d, ffn = config.hidden_size, config.intermediate_size
        self.time_maa_k = nn.Parameter(torch.zeros(1, 1, d))
        self.time_maa_r = nn.Parameter(torch.zeros(1, 1, d))
        self.key = nn.Linear(d, ffn, bias=False)
        self.receptance = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(ffn, d, bias=False)

    def forward(
        self, x: torch.Tensor, ends: torch.Tensor | None, state: LayerState | None, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        first = None if state is None else state.channel
        if state is not None:
            assert lengths is not None
            state.channel = last_tokens(x, lengths)
        return self.mix_then(self.mix, self.look_up, (x, ends, first))

    def mix(
        self, x: torch.Tensor, ends: torch.Tensor | None, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two mixtures [B, T, D] of each token with the one before it."""
        step = previous_tokens(x, ends, first) - x
        return x + step * self.time_maa_k, x + step * self.time_maa_r

    def look_up(self, k: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.receptance(r)) * self.linear_then(self.key, self.shrink, (k,))

    def shrink(self, grown: torch.Tensor) -> torch.Tensor:
        return self.activate_then(squared_relu, self.value, (grown,))


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


class Block(ModelBlock):
    """Time mix and channel mix, each behind a norm and beside the residual stream. The first block has a norm more."""

    norm_then: Callable[..., torch.Tensor]

    def __init__(self, config: Rwkv6Config, first: bool):
        super().__init__()
        self.norm_then = in_turn
        if first:
            self.pre_ln = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.ln1 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.ln2 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attention = TimeMix(config)
        self.feed_forward = ChannelMix(config)
        self.first = first

    def forward(
        self,
        x: torch.Tensor,
        ends: torch.Tensor | None,
        state: LayerState | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.first:
            x = self.pre_ln(x)
        x = x + self.norm_then(self.ln1, self.attention, (x,), ends, state, lengths)
        return x + self.norm_then(self.ln2, self.feed_forward, (x,), ends, state, lengths)

    def recompute(self, keep: Sequence[str], draws: bool) -> None:
        """Recompute norms, mixtures and activations in the backward pass (the recurrence is, in any case), and what
        `keep` does not name: the time mix's linear layers ("qkv"), the channel mix's key ("gate_up")."""
        time, channel = self.attention, self.feed_forward
        self.norm_then = time.mix_then = channel.mix_then = channel.activate_then = recompute_first
        linear_then = functools.partial(recompute_first, draws=draws)
        if "qkv" not in keep:
            time.linear_then = linear_then
        if "gate_up" not in keep:
            channel.linear_then = linear_then


class Rwkv6Stack(nn.Module):
    """The part that HF checkpoints keep under `rwkv.`"""

    def __init__(self, config: Rwkv6Config):
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)


class Rwkv6(Model):
    """Causal language model."""

    def __init__(self, config: Rwkv6Config):
        super().__init__()
        self.config = config
        self.rwkv = Rwkv6Stack(config)
        self.head = Head(config.hidden_size, config.vocab_size)

    def blocks(self) -> Iterator[Block]:
        """The layers, as what they are."""
        for block in self.rwkv.blocks:
            assert isinstance(block, Block)
            yield block

    def embedding(self) -> nn.Module:
        return self.rwkv.embeddings

    def final_norm(self) -> nn.Module:
        return self.rwkv.ln_out

    def output_head(self) -> nn.Module:
        return self.head

    def block_inputs(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[None]:
        return (None,)

    def new_cache(self, slots: int) -> State:
        return State(self.config.num_hidden_layers)

    def initial(self, name: str) -> float | torch.Tensor | None:
        """Norms begin at 1, biases at 0, mixtures and decays spread over the channels; matrices are drawn."""
        last = name.rpartition(".")[2]
        if last == "bias":
            return 0.0
        if ".ln" in name or ".pre_ln" in name:
            return 1.0
        if not last.startswith("time_") or last[-2:] in ("w1", "w2"):
            return None
        d, layers = self.config.hidden_size, self.config.num_hidden_layers
        depth = int(name.split(".")[2])
        down, up = 1 - depth / layers, depth / max(1, layers - 1)
        channel = torch.arange(d) / d
        if last == "time_decay":  # e^-e^this: from nearly 1 down to e^-e^-1
            return (-6 + 5 * channel ** (0.7 + 1.3 * up)).view(1, 1, d)
        if last == "time_faaaa":
            return ((1 - channel) * up).view(-1, self.get_parameter(name).shape[1])
        return (1 - channel ** (down / 2 if last[-1] in "rg" else down)).view(1, 1, d)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: State | None = None,
        select: torch.Tensor | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """As `Model.forward`; positions say nothing here. What lies behind `select` leaves no trace in the cache."""
        assert documents is None or cache is None
        batch, length = input_ids.shape
        ends = lengths = None
        if documents is not None:
            ends = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
        if cache is not None:
            full = torch.full((batch,), length, device=input_ids.device)
            lengths = full if select is None else select + 1
        h = self.rwkv.embeddings(input_ids)
        for i, block in enumerate(self.rwkv.blocks):
            h = block(h, ends, cache.layers[i], lengths) if cache else block(h, ends)
        if select is not None:
            h = last_tokens(h, select + 1)[:, None]
        return self.head(self.rwkv.ln_out(h), targets)
