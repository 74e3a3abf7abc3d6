"""RoBERTa for sequence classification: a bidirectional encoder in the layout and under the names of Hugging Face.

Learned positions, which begin behind the padding token's number; norms behind the residual sums; biases everywhere.
Shapes: B sequences, T positions, D hidden, H heads, C channels per head; L labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.errors import UserError
from titan_hd.models.classification import ClassificationHead, classification_loss
from titan_hd.models.config_values import number_of, refuse_unsupported, size_of
from titan_hd.models.decoder import Embedding, project_each, restarting_positions
from titan_hd.models.head import Targets
from titan_hd.models.model import Model, ModelBlock
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.recompute import in_turn, recompute_first

ARCHITECTURE = "RobertaForSequenceClassification"
MODEL_TYPE = "roberta"

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "quantization_config": (None, {}),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
}
_READ = {
    *_SIZES,
    *_UNSUPPORTED,
    *("architectures", "model_type", "max_position_embeddings", "layer_norm_eps", "pad_token_id", "type_vocab_size"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "id2label", "label2id"),
    *("num_labels", "problem_type"),
}
_HARMLESS = {
    *("transformers_version", "torch_dtype", "dtype", "_name_or_path", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings", "gradient_checkpointing", "output_past"),
    *("_num_labels", "finetuning_task", "return_dict", "output_attentions", "output_hidden_states"),
    "chunk_size_feed_forward",
}


@dataclass(frozen=True)
class RobertaConfig(ModelConfig):
    """Sizes of a RoBERTa with a classification head, in HF's names.

    max_position_embeddings: the most tokens that a sequence may have; the table has pad_token_id + 1 rows more.
    label_names: of the classes, as the records spell them; one: of a score.
    head_names: the classes that config.json gives the head of the files, if they have one.
    hidden_dropout, attention_dropout, classifier_dropout: shares that are dropped in training.
    ignored, hf: as of `DecoderConfig`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    pad_token_id: int
    layer_norm_eps: float
    label_names: tuple[str, ...]
    hidden_dropout: float
    attention_dropout: float
    classifier_dropout: float
    head_names: tuple[str, ...] = field(repr=False, compare=False)
    ignored: tuple[str, ...] = field(repr=False, compare=False)
    hf: dict[str, Any] = field(repr=False, compare=False)

    causal: ClassVar[bool] = False
    endless: ClassVar[bool] = False
    tie_word_embeddings: ClassVar[bool] = False  # pyrefly: ignore[bad-override]: no weights of it are tied
    new_weights: ClassVar[tuple[str, ...]] = ("classifier.",)
    base_prefix: ClassVar[str] = "roberta."
    blocks_name: ClassVar[str] = "roberta.encoder.layer"

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @property
    def other_weights(self) -> tuple[str, ...]:
        """A head with another number of outputs among them: the model's is then a new one."""
        others = ("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids")
        return others if len(self.head_names) == self.num_labels else (*others, *self.new_weights)

    @property
    def draws(self) -> bool:
        return max(self.hidden_dropout, self.attention_dropout, self.classifier_dropout) > 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path in a block -> (out, in) of each of its linear layers."""
        d, ffn = self.hidden_size, self.intermediate_size
        return {
            "attention.self.query": (d, d),
            "attention.self.key": (d, d),
            "attention.self.value": (d, d),
            "attention.output.dense": (d, d),
            "intermediate.dense": (ffn, d),
            "output.dense": (d, ffn),
        }

    def mixing_flops(self, length: float) -> float:
        """Of attention: scores and values."""
        return 4 * self.hidden_size * length * self.num_hidden_layers


def parse_roberta(raw: dict[str, Any], where: str) -> RobertaConfig:
    """Turn the keys of a config.json into a RobertaConfig.

    Raises:
        UserError: a key that is wrong, or that the model has not, by name; `where` stands in front.
    """
    refuse_unsupported(raw, _UNSUPPORTED, where)
    sizes = {key: size_of(raw, key, where) for key in _SIZES}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % heads:
        raise UserError(f"{where}: num_attention_heads: must divide hidden_size ({hidden}), not {heads}")
    padding = raw.get("pad_token_id", 1)
    if type(padding) is not int or not 0 <= padding < sizes["vocab_size"]:
        raise UserError(f"{where}: pad_token_id: must be an id of the vocabulary, not {padding!r}")
    positions = size_of(raw, "max_position_embeddings", where, 512) - padding - 1
    if positions < 1:
        raise UserError(f"{where}: max_position_embeddings: must be above pad_token_id + 1 = {padding + 1}")
    dropout = _share(raw, "hidden_dropout_prob", where, 0.1)
    names = _label_names(raw, where)
    if raw.get("problem_type") not in (None, kind := _problem_type(names)):
        given = f"problem_type: {raw['problem_type']!r} with {len(names)} label(s)"
        raise UserError(f"{where}: {given} is not supported; only {kind} is")
    labels = tuple(str(i) if name == f"LABEL_{i}" else name for i, name in enumerate(names))
    return RobertaConfig(
        **sizes,
        max_position_embeddings=positions,
        type_vocab_size=size_of(raw, "type_vocab_size", where, 2),
        pad_token_id=padding,
        layer_norm_eps=number_of(raw, "layer_norm_eps", where, 1e-12),
        label_names=labels,
        head_names=labels,
        hidden_dropout=dropout,
        attention_dropout=_share(raw, "attention_probs_dropout_prob", where, 0.1),
        classifier_dropout=_share(raw, "classifier_dropout", where, dropout),
        ignored=tuple(sorted(key for key, value in raw.items() if value and key not in _READ | _HARMLESS)),
        hf=_as_classifier(raw, names),
    )


def _as_classifier(raw: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config.json of an export: transformers counts the classes of id2label."""
    classes = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": _problem_type(names),
    }
    return {**raw, "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **classes}


def _problem_type(names: Sequence[str]) -> str:
    return "regression" if len(names) == 1 else "single_label_classification"


def with_labels(config: ModelConfig, names: Sequence[str]) -> RobertaConfig:
    """The configuration with a head for these classes; one name: for a score."""
    assert isinstance(config, RobertaConfig)
    if tuple(names) == config.label_names:
        return config  # "0" stays LABEL_0 in the config.json of an export
    hf = _as_classifier({key: value for key, value in config.hf.items() if key != "num_labels"}, names)
    return dataclasses.replace(config, label_names=tuple(names), hf=hf)


def _share(raw: dict[str, Any], key: str, where: str, default: float) -> float:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{where}: {key}: must be a number from 0 to below 1, not {value!r}")
    return float(value)


def _label_names(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """The names of id2label in the order of their ids; else LABEL_0 and so on, num_labels of them (default 2)."""
    given = raw.get("id2label")
    if not given:
        return tuple(f"LABEL_{i}" for i in range(size_of(raw, "num_labels", where, 2)))
    try:
        names = {int(i): str(name) for i, name in given.items()}
    except (AttributeError, TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(names))) or not names or len(set(names.values())) < len(names):
        raise UserError(f"{where}: id2label: must map 0, 1, ... to names that differ")
    return tuple(names[i] for i in range(len(names)))


class SelfAttention(nn.Module):
    """query, key and value; `project` and `project_then` as of `models.decoder.Attention`."""

    project: Callable[..., tuple[torch.Tensor, ...]]
    project_then: Callable[..., torch.Tensor]

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.project, self.project_then = project_each, in_turn
        self.head_dim, self.dropout, d = config.head_dim, config.attention_dropout, config.hidden_size
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.project_then(self.heads, self.attend, (x,), mask)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [B, H, T, C] of x [B, T, D]."""
        projected = self.project(x, self.query, self.key, self.value)
        return tuple(y.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for y in projected)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, T, D]"""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).flatten(2)


class ResidualNorm(nn.Module):
    """The layer norm of x + dropout(dense(y))."""

    def __init__(self, inner: int, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout

    def residual(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x + dropout(dense(y)), [B, T, D]; y: [B, T, inner]."""
        return x + F.dropout(self.dense(y), self.dropout, self.training)


class Attention(nn.Module):
    """`self` and `output`, as HF names them."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualNorm(config.hidden_size, config)


class Intermediate(nn.Module):
    """The MLP's first layer."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class Layer(ModelBlock):
    """Attention and MLP, each with a norm behind the residual sum. `norm_then`, `grow_then` and `activate_then` call
    two steps one after the other; activation checkpointing replaces them by `recompute_first`."""

    norm_then: Callable[..., torch.Tensor]
    grow_then: Callable[..., torch.Tensor]
    activate_then: Callable[..., torch.Tensor]

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.norm_then = self.grow_then = self.activate_then = in_turn
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualNorm(config.intermediate_size, config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.attention.output.residual(self.attention.self(x, mask), x)
        return self.output.LayerNorm(self.norm_then(self.attention.output.LayerNorm, self.mlp, (x,)))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """The residual sum of x [B, T, D] and the MLP's result."""
        return self.grow_then(self.intermediate.dense, self.shrink, (x,), x)

    def shrink(self, grown: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.activate_then(F.gelu, self.output.residual, (grown,), x)

    def recompute(self, keep: Sequence[str], draws: bool) -> None:
        """Recompute the norm and the activation in the backward pass, and what `keep` does not name: q, k, v ("qkv"),
        the MLP's first layer ("gate_up"). draws: adapters have dropout."""
        self.norm_then = self.activate_then = recompute_first
        drawing = functools.partial(recompute_first, draws=draws)
        if "qkv" not in keep:
            self.attention.self.project_then = drawing
        if "gate_up" not in keep:
            self.grow_then = drawing


class Embeddings(nn.Module):
    """Sum of the embeddings of token, position and segment (all tokens are of segment 0), normalised."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        d, self.first, self.dropout = config.hidden_size, config.pad_token_id + 1, config.hidden_dropout
        self.word_embeddings = Embedding(config.vocab_size, d)
        self.position_embeddings = Embedding(config.max_position_embeddings + self.first, d)
        self.token_type_embeddings = Embedding(config.type_vocab_size, d)
        self.LayerNorm = nn.LayerNorm(d, config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[B, T, D] of ids and 0-based positions [B, T]."""
        h = self.word_embeddings(input_ids) + self.position_embeddings(positions + self.first)
        h = self.LayerNorm(h + self.token_type_embeddings.weight[0])
        return F.dropout(h, self.dropout, self.training)


class Encoder(nn.Module):
    """The layers."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class RobertaStack(nn.Module):
    """The part that HF checkpoints keep under `roberta.`"""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)


class Roberta(Model):
    """Sequence classifier."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.config = config
        self.roberta = RobertaStack(config)
        self.classifier = ClassificationHead(config.hidden_size, config.num_labels, config.classifier_dropout)

    def blocks(self) -> Iterator[Layer]:
        """The layers, as what they are."""
        for layer in self.roberta.encoder.layer:
            assert isinstance(layer, Layer)
            yield layer

    def embedding(self) -> nn.Module:
        return self.roberta.embeddings

    def final_norm(self) -> None:
        """There is none: each block ends with its own."""

    def output_head(self) -> nn.Module:
        return self.classifier

    def trained_head(self) -> nn.Module:
        """A classification head is of one task."""
        return self.classifier

    def block_inputs(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor]:
        batch, length = positions.shape
        return (torch.ones(batch, 1, length, length, dtype=torch.bool),)

    def initial(self, name: str) -> float | None:
        """1 for norms, 0 for biases; matrices are drawn."""
        if name.endswith("bias"):
            return 0.0
        return 1.0 if name.endswith("LayerNorm.weight") else None

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: Any = None,
        select: torch.Tensor | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """Logits [B, L] of the first tokens of the rows of token ids [B, T], or the loss of targets.

        positions: [B, T], 0-based; by default 0..T-1, and with documents from 0 on in each of them.
        documents: [B, T], the number of each token's document, of which padding is one: a token sees its own document.
            Left out, every token sees the whole row.
        targets: return the sum of the losses of the labels, [] in fp32, each at the first position of its sequence.
        """
        assert cache is None, "an encoder generates nothing"
        assert select is None, "an encoder generates nothing"
        if positions is None and documents is not None:
            # Padding may be longer than the table, and what it is does not matter.
            positions = restarting_positions(documents).clamp(max=self.config.max_position_embeddings - 1)
        elif positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand(len(input_ids), -1)
        mask = None if documents is None else (documents[:, :, None] == documents[:, None, :])[:, None]
        h = self.roberta.embeddings(input_ids, positions)
        for layer in self.roberta.encoder.layer:
            h = layer(h, mask)
        if targets is None:
            return self.classifier(h[:, 0])
        first = h.flatten(0, 1).index_select(0, targets.positions)
        return classification_loss(self.classifier(first), targets.labels)
