"""Continues prompts by beam search: of each prompt the continuation whose tokens have the highest mean log-probability
among those that were found.

In words: of every prompt some continuations, its beams, are kept. In each pass every beam is extended by every token,
and the extensions are ranked by the sum of their log-probabilities. Those among the first `beams` that end (at a stop
token, or at the limit) are finished, with their mean log-probability; the best that go on are the next beams. A prompt
is done when it has `beams` finished continuations and its best beam is, by its mean so far, no better than the worst of
them; then its beams leave the batch. These are the rules of the transformers library (length_penalty 1, early_stopping
false), which published figures were made with.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist

from titan_hd.components.generation import agree_on_end, padded
from titan_hd.models.model import Model


class _Search:
    """The beams of one prompt, and what is finished."""

    def __init__(self, width: int, stop_ids: Collection[int]):
        self._width, self._stop_ids = width, stop_ids
        self.rows: list[list[int]] = [[]]  # new tokens of each beam, the best first
        self._finished: list[tuple[float, list[int]]] = []  # mean log-probability and tokens, the best first
        self.done = False

    def extend(self, ranked: list[tuple[float, int, int]], at_limit: bool) -> list[tuple[float, int, int]]:
        """Take the best extensions, (sum of log-probabilities, beam, token); returns those that become the beams."""
        length = len(self.rows[0]) + 1
        ends = [at_limit or token in self._stop_ids for _, _, token in ranked]
        if not self.done:
            for (score, beam, token), end in list(zip(ranked, ends))[: self._width]:
                if end:
                    self._finished.append((score / length, [*self.rows[beam], token]))
            self._finished = sorted(self._finished, key=lambda found: -found[0])[: self._width]
        going = [extension for extension, end in zip(ranked, ends) if not end][: self._width]
        if going:
            self.rows = [[*self.rows[beam], token] for _, beam, token in going]
            full = len(self._finished) == self._width
            self.done = self.done or (full and going[0][0] / length <= self._finished[-1][0])
        return going

    def best(self) -> list[int]:
        """The best continuation, without its stop token."""
        row = self._finished[0][1]
        return row[:-1] if row[-1] in self._stop_ids else row


@torch.no_grad()
def beam_search(
    model: Model,
    prompts: list[list[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    device: torch.device,
    beams: int,
    group: dist.ProcessGroup | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, without the stop token.

    group: all workers that share the model, as for `generation.stream`; one without prompts calls this, too.

    Raises:
        UserError: a prompt is empty.
        FloatingPointError: logits are not finite (on all workers).
    """
    ids, ends = padded(prompts or [[0]], device)  # without prompts: a row that nobody heeds
    cache = model.new_cache(ids.shape[1] + max_new_tokens)
    searches = [_Search(beams, stop_ids) for _ in ends]
    in_batch = list(searches)
    scores = torch.zeros(len(searches), 1, device=device)
    positions, select, rows = None, ends - 1, ids
    keep = max(2, 1 + len(stop_ids)) * beams  # so many that `beams` of them go on, whichever end
    for step in range(max_new_tokens):
        cache.look_at(ids.shape[1] + step)
        with torch.compiler.set_stance("force_eager"):  # shapes that change in every pass are not worth compiling
            logits = model(rows, positions, cache=cache, select=select)[:, 0].float()
        width, vocabulary = scores.shape[1], logits.shape[-1]
        totals = (scores[..., None] + logits.log_softmax(-1).view(len(in_batch), width, vocabulary)).flatten(1)
        best, places = totals.topk(min(keep, totals.shape[1]))
        beams_of, tokens = (places // vocabulary).tolist(), (places % vocabulary).tolist()
        last = step + 1 == max_new_tokens
        going = [
            search.extend(list(zip(*ranked)), last)
            for search, *ranked in zip(in_batch, best.tolist(), beams_of, tokens)
        ]
        broken = bool(prompts) and not logits.amax().isfinite()
        done = last or not prompts or all(search.done for search in searches)
        if agree_on_end(broken, done, device, group, step):
            break
        # Others may go on where no prompt does here: then one stays, so that there is something to pass.
        staying = [n for n, search in enumerate(in_batch) if not search.done] or [0]
        cache.take(torch.tensor([n * width + beam for n in staying for _, beam, _ in going[n]], device=device))
        scores = torch.tensor([[score for score, _, _ in going[n]] for n in staying], device=device)
        rows = torch.tensor([[token] for n in staying for _, _, token in going[n]], device=device)
        in_batch, ends = [in_batch[n] for n in staying], ends[torch.tensor(staying, device=device)]
        positions, select = (ends + step).repeat_interleave(beams)[:, None], None
    return [search.best() for search in searches[: len(prompts)]]
