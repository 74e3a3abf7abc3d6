"""Beam search against transformers' own, over stop tokens, batches and widths."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.decoders import VARIANTS, random_decoder
from titan_hd.components.beam_search import beam_search
from titan_hd.components.generation import generate
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import read_hf_config

CPU = torch.device("cpu")
PROMPTS = [[5, 17, 3], [9, 8, 7, 6, 5, 44, 3, 2, 1, 60, 11], [33]]
NEW = 16


def transformers_beams(raw: dict, weights: dict, prompt: list[int], stops: list[int], beams: int) -> list[int]:
    """New tokens of one prompt by itself, cut before the stop token."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        num_beams=beams, max_new_tokens=NEW, pad_token_id=0, eos_token_id=stops or None,
    )  # fmt: skip
    new = out[0, len(prompt) :].tolist()
    end = next((place for place, token in enumerate(new) if token in stops), len(new))
    return new[:end]


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("stops", [[], [7], [7, 12, 40]])
def test_transformers_finds_the_same(stops: list[int], beams: int):
    """A vocabulary of some dozens: beams end early, late and never."""
    raw = VARIANTS["grouped-query"][0]
    model = random_decoder(raw, seed=3)
    rows = beam_search(model, PROMPTS, stops, NEW, CPU, beams)
    expected = [transformers_beams(raw, model.state_dict(), prompt, stops, beams) for prompt in PROMPTS]
    assert rows == expected
    assert rows != generate(model, PROMPTS, stops, NEW, CPU)


def test_a_real_model_ends_its_sentences_as_with_transformers(shared_data: Path):
    """Full stops end a story here, so that continuations of unequal lengths compete."""
    folder = shared_data / "stories260k-hf"
    model, tokenizer = Decoder(read_hf_config(folder)), load_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(weights)
    texts = ["Once upon a time", "Lily and her dog went to the", "The", "Tom was sad. He", "One day, a big bird saw"]
    prompts = [[1, *tokenizer.encode(text)] for text in texts]
    stops = [tokenizer.encode("He ran.")[-1], tokenizer.eos_id]
    rows = beam_search(model, prompts, stops, NEW, CPU, 4)
    assert rows == [transformers_beams(model.config.hf, weights, prompt, stops, 4) for prompt in prompts]
    assert len(set(map(len, rows))) > 2


def test_prompts_that_are_done_leave_the_batch():
    """The passes get smaller, and the answers stay those of each prompt by itself."""
    model, stops = random_decoder(VARIANTS["grouped-query"][0], seed=3), [7, 12, 40]
    prompts = [[i, *range(i % 5 + 1)] for i in range(1, 9)]
    alone = [beam_search(model, [prompt], stops, NEW, CPU, 2)[0] for prompt in prompts]
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert beam_search(model, prompts, stops, NEW, CPU, 2) == alone
    assert sizes[:2] == [8, 16]
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < 16


def test_one_beam_is_greedy():
    model = random_decoder(VARIANTS["grouped-query"][0], seed=3)
    assert beam_search(model, PROMPTS, [7], NEW, CPU, 1) == generate(model, PROMPTS, [7], NEW, CPU)


def test_logits_that_are_not_finite():
    model = random_decoder(VARIANTS["grouped-query"][0])
    model.load_state_dict({name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()})
    with pytest.raises(FloatingPointError, match="new token 1: the logits are not finite"):
        beam_search(model, PROMPTS, [7], NEW, CPU, 2)
