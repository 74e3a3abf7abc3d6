"""Likelihoods of continuations, in batches, against each by itself in plain loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kit.decoders import VARIANTS, random_decoder
from titan_hd.components.generation import generate
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.evaluation.likelihood import encode_pair, log_likelihoods

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # fp32, sums of a dozen terms of about 4, in batches of other shapes


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_give_what_each_pair_gives_by_itself(batch_size: int):
    model = random_decoder(VARIANTS["grouped-query"][0], seed=3)
    pairs = [([5, 17, 3], [8]), ([9], [8, 7, 6, 5]), ([33, 2], []), ([1, 2, 3, 4, 5, 6, 7], [4, 4]), ([2], [60, 0, 60])]
    greedy = generate(model, [[5, 17, 3]], (), 6, CPU)[0]
    pairs.append(([5, 17, 3], greedy))
    found = log_likelihoods(model, pairs, CPU, batch_size)
    for (context, continuation), likelihood in zip(pairs, found):
        text, expected, greedily = list(context), 0.0, True
        for token in continuation:
            with torch.no_grad():
                probabilities = model(torch.tensor([text]))[0, -1].double().softmax(-1)
            expected += probabilities[token].log().item()
            greedily &= int(probabilities.argmax()) == token
            text.append(token)
        assert likelihood.log_probability == pytest.approx(expected, abs=TOLERANCE)
        assert (likelihood.tokens, likelihood.is_greedy) == (len(continuation), greedily)
    assert [likelihood.is_greedy for likelihood in found] == [False, False, True, False, False, True]


def test_a_pair_is_cut_where_the_context_ends(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "stories260k-hf")
    context, continuation = encode_pair(tokenizer, "Once upon a ", "time")
    assert (context, continuation) == encode_pair(tokenizer, "Once upon a", " time")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert context + continuation == [*bos, *tokenizer.encode("Once upon a time")]
    assert tokenizer.decode(continuation).strip() == "time"
    assert encode_pair(tokenizer, "", "Once") == (bos or [tokenizer.eos_id], tokenizer.encode("Once"))
