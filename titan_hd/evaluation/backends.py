"""Who answers: the decoder of titan_hd, or the transformers library's model from the same directory (vllm has its own
module)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from titan_hd.components.beam_search import beam_search
from titan_hd.components.generation import GREEDY, Sampling, choose, draw, generate
from titan_hd.errors import UserError
from titan_hd.models.model import Model


@dataclass(frozen=True)
class Request:
    """How prompts are to be answered.

    stop_ids: tokens that end an answer.
    beams: width of the beam search; 1: greedy, or by `sampling`.
    ended: whether the new tokens of a row so far hold a text that ends it. Only what saves time asks: the caller cuts
        off what stands behind such a text.
    keys: what the sampled tokens of each prompt depend on, with the seed.
    """

    stop_ids: Collection[int]
    max_new_tokens: int
    beams: int = 1
    ended: Callable[[list[int]], bool] = lambda row: False
    sampling: Sampling = GREEDY
    keys: Sequence[str] = ()


class Backend(Protocol):
    """Answers prompts."""

    def generate(self, prompts: list[list[int]], request: Request) -> list[list[int]]:
        """The new tokens of each prompt, without the stop token."""
        ...


class NativeBackend:
    """Our decoder: one batch at a time with a key/value cache.

    group: the process group of those that have the model's shards, if it is sharded. They all generate at the same
    time, at most equally many tokens, some perhaps for no prompts.
    """

    def __init__(self, model: Model, device: torch.device, group: Any = None):
        self._model, self._device, self._group = model, device, group

    def generate(self, prompts: list[list[int]], request: Request) -> list[list[int]]:
        """As `Backend.generate`; with a group, collective."""
        how = (self._model, prompts, request.stop_ids, request.max_new_tokens, self._device)
        if request.beams > 1:
            return beam_search(*how, request.beams, self._group)
        return generate(*how, request.sampling, group=self._group, keys=request.keys or None, ended=request.ended)


class TransformersBackend:
    """transformers' model of a HF directory, with its own generation.

    adapter: the folder of an adapter that the peft library puts onto the model.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, pad_id: int, adapter: Path | None = None
    ):
        """Raises:
        UserError: a library is not there, or cannot load the directory or the adapter.
        """
        try:
            import transformers
        except ImportError:
            raise UserError(
                "--backend: transformers is not installed: pip install transformers, or titan_hd[eval]"
            ) from None
        if not (directory / "config.json").is_file():
            raise UserError(f"--backend: transformers reads HF directories; {directory} has no config.json")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory}: transformers cannot load it: {' '.join(str(error).split())}") from None
        if adapter is not None:
            model = _with_adapter(model, adapter)
        self._model, self._device, self._pad_id = model.to(device).eval(), device, pad_id

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], request: Request) -> list[list[int]]:
        """As `Backend.generate`."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded at the left, where its generation wants it
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            num_beams=request.beams,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(request.stop_ids),
            pad_token_id=self._pad_id,
            # Stop texts end rows of a batch, but not beams, which would then compete otherwise than in our search.
            stopping_criteria=[_ends_by_text(request.ended, width)] if request.beams == 1 else None,
            logits_processor=[_draws(request.sampling, request.keys, width)] if request.sampling != GREEDY else None,
        )
        return without_stops(out[:, width:].tolist(), request.stop_ids)


def without_stops(rows: list[list[int]], stop_ids: Collection[int]) -> list[list[int]]:
    """The rows up to their first stop token, without it."""
    ends = [next((place for place, token in enumerate(row) if token in stop_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with the adapter beside its weights, not merged into them."""
    try:
        import peft
    except ImportError:
        raise UserError(f"{adapter}: is an adapter, which needs the package peft: pip install peft") from None
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{adapter}: peft cannot load it: {' '.join(str(error).split())}") from None


# transformers calls both with all token ids so far, [B, width + new].


def _ends_by_text(ended: Callable[[list[int]], bool], width: int) -> Callable[..., torch.Tensor]:
    """Which rows [B] have ended; `width` tokens of each are the prompt."""

    def criterion(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.tensor([ended(row) for row in ids[:, width:].tolist()], device=ids.device)

    return criterion


def _draws(sampling: Sampling, keys: Sequence[str], width: int) -> Callable[..., torch.Tensor]:
    """Our own draw of the next token, as scores that leave nothing else to choose: transformers' sampling depends on
    the batch."""

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = choose(scores, sampling, [draw(sampling.seed, key, ids.shape[1] - width) for key in keys])
        if (chosen < 0).any():
            raise FloatingPointError(f"new token {ids.shape[1] - width + 1}: the logits are not finite")
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    return processor
