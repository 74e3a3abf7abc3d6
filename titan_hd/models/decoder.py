"""The Llama-family decoder: plain modules in the layout and under the names of Hugging Face checkpoints.

Nothing here knows of parallelism, adapters or the configuration file. Shapes: B sequences, T positions, D hidden,
H query heads, G key/value heads, C channels per head; S slots of a key/value cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from titan_hd.models import flex
from titan_hd.models.decoder_config import DecoderConfig
from titan_hd.models.head import Head, Targets, logits_or_loss
from titan_hd.models.model import Model, ModelBlock
from titan_hd.models.norm import RMSNorm
from titan_hd.models.recompute import in_turn, recompute_first
from titan_hd.models.rope import RotaryEmbedding, rotate

_SLOT_STEP = 64  # of a cache, that are looked at


def repeat_heads(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, G, S, C] as [B, H, S, C], each as often as there are query heads for it.

    On GPUs fp32 and masks leave the memory-efficient kernel alone, which has no grouped-query attention: asked for it,
    torch takes the plain formula, with scores [B, H, T, S] in memory.
    """
    times = heads // k.shape[1]
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


def project_each(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Several linear layers of one input."""
    return tuple(layer(x) for layer in layers)


class LayerCache:
    """Keys and values of one layer, [B, G, S, C]; slot p holds position p. The first `reach` of them are looked at."""

    def __init__(self, slots: int):
        self.slots = self.reach = slots
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [B, G, T, C] into the slots of positions [B, T]; returns the slots that are looked at."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.slots, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        index = positions[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k)
        self.values.scatter_(2, index, v)
        return self.keys[:, :, : self.reach], self.values[:, :, : self.reach]


class KVCache:
    """Keys and values of all layers, kept between the forward passes of a generation, for positions below `slots`.

    A slot is visible to queries at its position or later. So prompts of unequal lengths may be padded at the right: the
    padding's slots are visible to nobody until a generated token has overwritten them.
    """

    def __init__(self, layers: int, slots: int):
        self.slots = self.reach = slots
        self.layers = [LayerCache(slots) for _ in range(layers)]

    def look_at(self, positions: int) -> None:
        """Let the next passes, which must be below these positions, look at so many slots and few more: attention costs
        what it looks at, seen or masked. The number grows in steps, so that there are few shapes."""
        self.reach = min(self.slots, -(-positions // _SLOT_STEP) * _SLOT_STEP)
        for layer in self.layers:
            layer.reach = self.reach

    def take(self, rows: torch.Tensor) -> None:
        """Keep these rows [B'] of the batch, in this order; one may be taken several times."""
        for layer in self.layers:
            assert layer.keys is not None, "filled by a pass"
            assert layer.values is not None, "filled by a pass"
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class Attention(nn.Module):
    """Grouped-query attention with RoPE. `project` applies q_proj, k_proj and v_proj to their common input; an adapter
    method whose layers can share work there replaces it by a function of its own. `project_then` calls `heads` and
    `attend`; activation checkpointing replaces it, and others named so, by `recompute_first`."""

    project: Callable[..., tuple[torch.Tensor, ...]]
    project_then: Callable[..., torch.Tensor]

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.project, self.project_then = project_each, in_turn
        self.head_dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.grouped = kv_heads != heads
        d, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(d, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, d, bias=config.o_bias)
        if config.qk_norm:  # of each head by itself
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | BlockMask | None,
        cache: LayerCache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = self.project_then(self.heads, self.attend, (x, cos, sin), mask, cache, positions)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def heads(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, H, T, C], keys and values [B, G, T, C] of x [B, T, D], rotated."""
        batch, length, _ = x.shape
        q, k, v = (
            y.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for y in self.project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | BlockMask | None,
        cache: LayerCache | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention [B, H, T, C] of what `heads` returns, and of what the cache has."""
        if cache is not None:
            assert positions is not None
            k, v = cache.update(k, v, positions)
        if isinstance(mask, BlockMask):
            return flex.attend(q, k, v, mask, self.grouped)
        grouped = self.grouped
        if grouped and q.is_cuda and (q.dtype == torch.float32 or mask is not None):
            k, v, grouped = *repeat_heads(k, v, q.shape[1]), False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class MLP(nn.Module):
    """The gated MLP. `project` applies gate_proj and up_proj to their common input, as in Attention."""

    project: Callable[..., tuple[torch.Tensor, ...]]
    project_then: Callable[..., torch.Tensor]
    activate_then: Callable[..., torch.Tensor]

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.project, self.project_then, self.activate_then = project_each, in_turn, in_turn
        d, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, ffn, bias=bias)
        self.up_proj = nn.Linear(d, ffn, bias=bias)
        self.down_proj = nn.Linear(ffn, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project_then(self.gate_and_up, self.down, (x,))

    def gate_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, T, intermediate] each."""
        return self.project(x, self.gate_proj, self.up_proj)

    def down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.activate_then(silu_times, self.down_proj, (gate, up))


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class Block(ModelBlock):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    norm_then: Callable[..., torch.Tensor]

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm_then = in_turn
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | BlockMask | None,
        cache: LayerCache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.norm_then(self.input_layernorm, self.self_attn, (x,), cos, sin, mask, cache, positions)
        return x + self.norm_then(self.post_attention_layernorm, self.mlp, (x,))

    def recompute(self, keep: Sequence[str], draws: bool) -> None:
        """Recompute the norms and the MLP's product in the backward pass, and what `keep` does not name: queries, keys
        and values ("qkv"), the outputs of gate_proj and up_proj ("gate_up")."""
        self.norm_then = self.mlp.activate_then = recompute_first
        project_then = functools.partial(recompute_first, draws=draws)
        if "qkv" not in keep:
            self.self_attn.project_then = project_then
        if "gate_up" not in keep:
            self.mlp.project_then = project_then


class Embedding(nn.Embedding):
    """Draws nothing on the meta device: torch would import its compiler for that, which takes a launcher a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class DecoderStack(nn.Module):
    """The part that HF checkpoints keep under `model.`"""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)


class Decoder(Model):
    """Causal language model. Tied models have no lm_head: they read the embedding, as their checkpoints store it."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config, self.layer_windows = config, config.layer_windows
        self.model = DecoderStack(config)
        self.lm_head = None if config.tie_word_embeddings else Head(config.hidden_size, config.vocab_size)

    def blocks(self) -> Iterator[Block]:
        """The layers, as what they are."""
        for layer in self.model.layers:
            assert isinstance(layer, Block)
            yield layer

    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    def final_norm(self) -> nn.Module:
        return self.model.norm

    def output_head(self) -> nn.Module | None:
        return self.lm_head

    def block_inputs(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return *self.model.rotary_emb(positions, dtype), None

    def new_cache(self, slots: int) -> KVCache:
        return KVCache(self.config.num_hidden_layers, slots)

    def initial(self, name: str) -> float | None:
        """1 for norms, 0 for biases; matrices are drawn."""
        owner, _, last = name.rpartition(".")
        if last == "bias":
            return 0.0
        return 1.0 if isinstance(self.get_submodule(owner), RMSNorm) else None

    def reset_buffers(self, device: torch.device) -> None:
        """Recompute what is not loaded from a checkpoint; call it after the parameters are materialised."""
        self.model.rotary_emb.reset_buffers(device)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: KVCache | None = None,
        select: torch.Tensor | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, vocabulary] for token ids [B, T], or the loss of targets; attention is causal.

        positions: [B, T], for RoPE, and as the slots of the tokens in the cache; by default 0..T-1, and with documents
            from 0 on in each of them.
        documents: [B, T], the number of each token's document; a token sees only its own document. For documents packed
            into one row, and for padding at the left.
        cache: keys and values of earlier passes, which the tokens see too; their own are added. Not with documents.
        select: [B], the one index into T whose logits are wanted; they come as [B, 1, vocabulary].
        targets: return the sum of their cross entropies, [] in fp32, instead of logits. Not with select.
        """
        assert documents is None or cache is None
        stack, (batch, length) = self.model, input_ids.shape
        if positions is None and documents is not None:
            positions = restarting_positions(documents)
        elif positions is None:
            positions = torch.arange(length, device=input_ids.device)[None].expand(batch, -1)
        h = stack.embed_tokens(input_ids)
        cos, sin = stack.rotary_emb(positions, h.dtype)
        masks = {
            window: flex.document_mask(documents, window)
            if documents is not None and documents.device.type in flex.DEVICES
            else attention_mask(length, window, positions, documents, cache.reach if cache else None)
            for window in set(self.layer_windows)
        }
        for i, layer in enumerate(stack.layers):
            mask = masks[self.layer_windows[i]]
            h = layer(h, cos, sin, mask, cache.layers[i], positions) if cache else layer(h, cos, sin, mask)
        if select is not None:
            h = h[torch.arange(batch, device=h.device), select][:, None]
        h = stack.norm(h)
        return self.tied_head(h, targets) if self.lm_head is None else self.lm_head(h, targets)

    def tied_head(self, h: torch.Tensor, targets: Targets | None = None) -> torch.Tensor:
        """Logits, or the loss, of tied models."""
        return logits_or_loss(h, self.model.embed_tokens.weight, targets)


def attention_mask(
    length: int,
    window: int | None,
    positions: torch.Tensor,
    documents: torch.Tensor | None,
    slots: int | None,
) -> torch.Tensor | None:
    """Which keys a query sees: boolean [B or 1, 1, T, T], or [B, 1, T, S] for the slots of a cache; None where plain
    causal attention is the same.

    A window counts tokens of the row, itself included. A row of a document sees at least itself, padding too: a row of
    attention that sees nothing would be NaN.
    """
    device = positions.device
    if slots is None:
        if documents is None and (window is None or length <= window):
            return None
        index = torch.arange(length, device=device)
        distance = (index[:, None] - index)[None]
    else:
        distance = positions[:, :, None] - torch.arange(slots, device=device)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask[:, None]


def restarting_positions(documents: torch.Tensor) -> torch.Tensor:
    """Each token's distance from the first of its document, [B, T]; a document's tokens stand side by side."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(1).values
