"""How probable a model finds a text behind another one: what evaluations by likelihood compare (lm-evaluation-harness).

model, assets = load_pretrained(Path("outputs/run/hf"), "", torch.float32, device)
tokenizer = load_tokenizer(assets)
pairs = [encode_pair(tokenizer, "The sky is", choice) for choice in (" blue", " green")]
log_likelihoods(model, pairs, device)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from titan_hd.components.generation import padded
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.models.model import Model


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: the sum of its tokens' log probabilities, in nats; how many tokens it has; and whether each of
    them is the most probable one, so that greedy generation would write it."""

    log_probability: float
    tokens: int
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a text and of what follows it, as lm-evaluation-harness cuts them: both are encoded as one text, of
    which as many ids are the context's as it has by itself. Spaces at its end go to the continuation, since most
    vocabularies have them at the beginning of words. In front stands BOS, if the family has one; the continuation of an
    empty context without BOS stands behind EOS.

    Raises:
        UserError: a text is none that the tokenizer takes.
    """
    stripped = context.rstrip()
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(stripped)
    return [*bos, *before] or [tokenizer.eos_id], whole[len(before) :]


@torch.no_grad()
def log_likelihoods(
    model: Model, pairs: Sequence[tuple[list[int], list[int]]], device: torch.device, batch_size: int = 8
) -> list[Likelihood]:
    """The likelihood of each continuation behind its context, in the order of the pairs.

    model: in eval mode, if it has dropout; its logits are normalised in fp32.
    pairs: token ids, at least one in a context. Nothing is cut: a text may be longer than the model was trained for.
    """
    found: dict[int, Likelihood] = {}
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))  # batches of like lengths
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, _ = padded([[*pairs[index][0], *pairs[index][1]] for index in batch], device)
        logits = model(ids)  # [B, T, vocabulary]
        for row, index in enumerate(batch):
            context, continuation = map(len, pairs[index])
            expected = slice(context - 1, context - 1 + continuation)  # each token by the logits of the one before
            targets = ids[row, context : context + continuation]
            found[index] = _likelihood(logits[row, expected].float().log_softmax(-1), targets)
    return [found[index] for index in range(len(pairs))]


def _likelihood(log_probabilities: torch.Tensor, targets: torch.Tensor) -> Likelihood:
    """log_probabilities: [n, vocabulary]; targets: [n]."""
    total = log_probabilities.gather(-1, targets[:, None]).sum().item()
    return Likelihood(total, len(targets), bool((log_probabilities.argmax(-1) == targets).all()))
