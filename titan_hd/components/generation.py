"""Continues prompts token by token, greedily or by sampling, with a key/value cache.

In words: one forward pass over a batch of prompts, padded at the right, fills the cache and gives every row its first
new token; each further pass takes one token per row. Rows end by themselves, at a stop token or where the caller says
so, and leave the batch and the cache: what has ended costs nothing.

The model may be the wrapped one of a run. Its forward passes gather shards, so all workers must make the same number of
them, whatever their prompts: after each pass they agree whether anybody goes on. Workers that hold the same prompts
(tensor parallelism) take the tokens of the first of them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError
from titan_hd.models.model import Model
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")

_DONE, _RUNNING, _BROKEN = range(3)  # a worker's state after a pass; the largest counts
# Rows leave when an eighth of the batch has ended: the cache is copied for it, which must stay rare in large batches.
_LEAVING_SHARE = 1 / 8


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: divides the logits; 0: the most probable token, always.
    top_k: only the k most probable tokens; 0: all.
    top_p: of these the fewest that have this probability together.
    seed: a token is a function of (seed, number of the prompt, step) and of its logits.

    Raises:
        UserError: a value is out of its range; names it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: must be a number from 0, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k: must be a whole number from 0 (all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: must be above 0 and at most 1, not {self.top_p}")


GREEDY = Sampling()


def generate(model: Model, prompts: list[list[int]], *args, **kwargs) -> list[list[int]]:
    """The new tokens of every prompt, without the stop token; arguments as for `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, *args, **kwargs):
        for row, token in zip(rows, tokens):
            if token is not None:
                row.append(token)
    return rows


@torch.no_grad()
def stream(
    model: Model,
    prompts: list[list[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    device: torch.device,
    sampling: Sampling = GREEDY,
    first_index: int = 0,
    group: dist.ProcessGroup | None = None,
    tp_group: dist.ProcessGroup | None = None,
    keys: Sequence[object] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Tokens as they come: for every step a list with the new token of each row, None where the row has ended.

    model: in eval mode, if it has dropout.
    prompts: token ids, at least one in each.
    first_index: number of prompts[0] among all prompts; sampled tokens depend on it and not on the batch.
    group: all workers that share the model. All of them call this, with equal max_new_tokens, and go on to the end; one
        that has no prompts, too.
    tp_group: those of them that have the same prompts.
    keys: what the sampled tokens of each prompt depend on, by its text, in place of its number.
    ended: whether a row ends after these, its new tokens so far; asked after each of them.

    Raises:
        UserError: a prompt is empty.
        FloatingPointError: logits of a row that goes on are not finite (on all workers).
    """
    keys = range(first_index, first_index + len(prompts)) if keys is None else keys
    running = [True] * len(prompts) or [False]
    ids, ends = padded(prompts or [[0]], device, first_index)  # without prompts: a row that nobody heeds
    lengths = ends.tolist()
    positions, select = None, ends - 1
    cache = model.new_cache(max(lengths) + max_new_tokens)
    in_batch = list(range(len(lengths)))  # the rows, in the order of the batch
    texts: list[list[int]] = [[] for _ in lengths]
    for step in range(max_new_tokens):
        cache.look_at(max(lengths[row] for row in in_batch) + step)
        with torch.compiler.set_stance("force_eager"):  # shapes that change in every pass are not worth compiling
            logits = model(ids, positions, cache=cache, select=select)[:, 0]
        draws = [draw(sampling.seed, keys[row], step) if running[row] else 0.0 for row in in_batch]
        chosen = choose(logits, sampling, draws)
        if tp_group is not None:
            dist.broadcast(chosen, group=tp_group, group_src=0)
        came: list[int | None] = [None] * len(lengths)
        broken = False
        for row, token in zip(in_batch, chosen.tolist()):
            broken = broken or (running[row] and token < 0)
            running[row] = running[row] and token not in stop_ids
            if running[row]:
                came[row] = token
                texts[row].append(token)
                running[row] = ended is None or not ended(texts[row])
        over = agree_on_end(broken, not any(running), device, group, step)
        new_length = max((lengths[row] + step + 1 for row, token in enumerate(came) if token is not None), default=0)
        if new_length > model.config.max_position_embeddings:
            _warn_of_length(model.config.max_position_embeddings)
        if any(token is not None for token in came) or not over:
            yield came[: len(prompts)]
        if over:
            return
        # Others may go on where no row does here: then one stays, so that there is something to pass.
        staying = [place for place, row in enumerate(in_batch) if running[row]] or [0]
        if len(in_batch) - len(staying) >= len(in_batch) * _LEAVING_SHARE:
            kept = torch.tensor(staying, device=device)
            cache.take(kept)
            chosen, ends, in_batch = chosen[kept], ends[kept], [in_batch[place] for place in staying]
        ids, positions, select = chosen.clamp(min=0)[:, None], (ends + step)[:, None], None


def padded(prompts: list[list[int]], device: torch.device, first_index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids [B, T], padded at the right, and their lengths [B].

    Raises:
        UserError: a prompt is empty; first_index is the number of the first one.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise UserError(f"prompt {first_index + lengths.index(0)}: is empty, and there is nothing to continue")
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids.to(device), torch.tensor(lengths, device=device)


def choose(logits: torch.Tensor, sampling: Sampling, draws: list[float]) -> torch.Tensor:
    """The next token [B] of each row of logits [B, vocabulary]; -1 where the largest logit is not finite.

    draws: a number in [0, 1) for each row, where the token lies on the row's cumulative probabilities.
    """
    largest = logits.amax(-1, keepdim=True)
    finite = largest.isfinite()[:, 0]
    if sampling.temperature == 0:
        return torch.where(finite, logits.argmax(-1), -1)
    # float64: temperatures may be tiny, and sums over a large vocabulary must not lose its tail. Stable: equal logits
    # stay in the order of their ids, on every device and in every batch.
    scaled = (logits.double() - largest.double()) / sampling.temperature
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[:, : sampling.top_k]
    mass = ordered.softmax(-1).cumsum(-1)
    last = (mass < sampling.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    point = torch.tensor(draws, dtype=mass.dtype, device=mass.device)[:, None] * mass.gather(-1, last)
    place = torch.searchsorted(mass, point, right=True).minimum(last)
    return torch.where(finite, ids.gather(-1, place)[:, 0], -1)


def draw(seed: int, key: object, step: int) -> float:
    """A number in [0, 1): the upper 53 bits of a hash."""
    return (stable_seed("generate", seed, key, step) >> 11) * 2.0**-53


def agree_on_end(broken: bool, done: bool, device: torch.device, group: dist.ProcessGroup | None, step: int) -> bool:
    """Whether all workers of the group are done after this pass; all of them call it.

    Raises:
        FloatingPointError: on all, if one of them has logits that are not finite.
    """
    state = _BROKEN if broken else _DONE if done else _RUNNING
    if group is not None:
        states = torch.tensor(state, device=device)
        dist.all_reduce(states, op=dist.ReduceOp.MAX, group=group)
        state = int(states.item())
    if state == _BROKEN:
        raise FloatingPointError(f"new token {step + 1}: the logits are not finite, so there is no next token")
    return state == _DONE


class TextStream:
    """Text of tokens as they come, in whole characters.

    What a token adds depends on those before it (a space, the first bytes of a character): so the last ones are decoded
    with and without it, and a text that ends within a character is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self._tokenizer = tokenizer
        self._shown, self._new = prompt, []  # tokens whose text is out, and those whose text is not

    def add(self, token: int) -> str:
        """The text that this token completes; often one piece, sometimes nothing."""
        self._new.append(token)
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown, self._new = self._new, []
        return text

    def end(self) -> str:
        """What was held back; bytes that are no character are U+FFFD."""
        text, self._new = self._pending(), []
        return text

    def _pending(self) -> str:
        return text_behind(self._tokenizer, self._shown, self._new)


def text_behind(tokenizer: Tokenizer, front: list[int], ids: list[int]) -> str:
    """Text of ids that stand behind others: with the space that some tokenizers (SentencePiece's kind) take away in
    front of a text."""
    front = front[-4:]  # enough for a whole character
    return tokenizer.decode([*front, *ids])[len(tokenizer.decode(front)) :]


@functools.cache  # once in a process
def _warn_of_length(limit: int) -> None:
    logger.warning("the text is longer than max_position_embeddings of config.json, %d tokens", limit)
