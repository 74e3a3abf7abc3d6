"""The decoder against transformers' own, and what it must not depend on: padding, how its buffers were made."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.decoders import LENGTH, LLAMA, SIZES, VARIANTS, config_of, random_decoder
from titan_hd.models.decoder import Decoder, KVCache
from titan_hd.models.decoder_config import DecoderConfig
from titan_hd.models.registry import read_hf_config

# Largest difference of two logits of size about 1. Both sides are fp32 sums of at most a few hundred terms in an order
# of their own; seen: below 4e-6.
LOGIT_TOLERANCE = 1e-5


def ids(config: DecoderConfig, batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def transformers_logits(
    raw: dict, weights: dict[str, torch.Tensor], input_ids: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if raw.get("tie_word_embeddings") else set())
    model.tie_weights()
    return model(input_ids=input_ids, use_cache=False, **inputs).logits


class TestAgainstTransformers:
    @pytest.mark.parametrize("variant", VARIANTS)
    @torch.no_grad()
    def test_logits(self, variant: str):
        raw, without = VARIANTS[variant]
        model = random_decoder(raw)
        input_ids = ids(model.config)
        logits = model(input_ids)
        reference = transformers_logits(raw, model.state_dict(), input_ids)
        assert logits.shape == reference.shape == (2, LENGTH, SIZES["vocab_size"])
        assert 0.3 < reference.std() < 10.0  # or the tolerance would mean nothing
        torch.testing.assert_close(logits, reference, rtol=0, atol=LOGIT_TOLERANCE)
        if without is not None:  # the feature matters at this size: leaving it out would be seen
            plain = Decoder(config_of(without))
            plain.load_state_dict(model.state_dict())
            assert (plain(input_ids) - reference).abs().max() > 1000 * LOGIT_TOLERANCE

    @pytest.mark.parametrize("variant", ["grouped-query", "mistral-window", "qwen2-window", "qwen3"])
    @torch.no_grad()
    def test_logits_with_padding_at_the_left(self, variant: str):
        """Padding is a document of its own; what it computes for itself is nobody's concern."""
        raw = VARIANTS[variant][0]
        model = random_decoder(raw)
        input_ids = ids(model.config)
        real = torch.ones_like(input_ids)
        real[0, :7] = 0
        positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids, positions, documents=real)
        assert logits.isfinite().all()
        reference = transformers_logits(raw, model.state_dict(), input_ids, attention_mask=real, position_ids=positions)
        torch.testing.assert_close(logits[real.bool()], reference[real.bool()], rtol=0, atol=LOGIT_TOLERANCE)

    @pytest.mark.parametrize(
        "variant", ["grouped-query", "llama3-rope", "mistral-window", "qwen2", "qwen3-layer-types"]
    )
    @torch.no_grad()
    def test_logits_of_packed_documents(self, variant: str):
        """transformers tells packed documents by positions that restart, and needs each row by itself for it."""
        raw = VARIANTS[variant][0]
        model = random_decoder(raw)
        input_ids = ids(model.config)
        lengths = [[9, 1, 14], [3, 21]]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        documents = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in lengths])
        packed = model(input_ids, positions, documents)
        assert torch.equal(model(input_ids, documents=documents), packed)  # positions restart unless given
        for row, pieces in enumerate(lengths):
            alone = [model(piece[None]) for piece in input_ids[row].split(pieces)]
            torch.testing.assert_close(packed[row], torch.cat(alone, 1)[0], rtol=0, atol=LOGIT_TOLERANCE)
            reference = [transformers_logits(raw, model.state_dict(), p[None]) for p in input_ids[row].split(pieces)]
            torch.testing.assert_close(packed[row], torch.cat(reference, 1)[0], rtol=0, atol=LOGIT_TOLERANCE)
        assert (packed - model(input_ids)).abs().max() > 1000 * LOGIT_TOLERANCE  # packing matters

    @pytest.mark.parametrize(
        "variant", ["llama3-rope", "linear-rope", "theta", "mistral-window", "qwen2-window", "qwen3"]
    )
    @torch.no_grad()
    def test_logits_by_the_config_that_transformers_writes(self, variant: str):
        """transformers 5 writes rope_parameters; the decoder built from its file is the decoder built from ours."""
        transformers = pytest.importorskip("transformers")
        raw, _ = VARIANTS[variant]
        written = transformers.AutoConfig.for_model(**copy.deepcopy(raw)).to_dict()
        written["architectures"] = raw["architectures"]
        ours, theirs = random_decoder(raw), random_decoder(json.loads(json.dumps(written)))
        input_ids = ids(ours.config)
        assert torch.equal(ours(input_ids), theirs(input_ids))

    @torch.no_grad()
    def test_a_real_pretrained_model(self, shared_data: Path):
        folder = shared_data / "stories260k-hf"
        raw, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        model = Decoder(read_hf_config(folder))
        model.load_state_dict(weights)
        input_ids = ids(model.config, length=48)
        input_ids[:, 0] = 1  # BOS: what the model was trained with
        reference = transformers_logits(raw, weights, input_ids)
        # Its logits reach 17, so the tolerance is relative to that.
        torch.testing.assert_close(model(input_ids), reference, rtol=LOGIT_TOLERANCE, atol=2 * LOGIT_TOLERANCE)

    @torch.no_grad()
    def test_a_real_pretrained_model_tells_a_story(self, shared_data: Path):
        folder = shared_data / "stories260k-hf"
        tokenizers = pytest.importorskip("tokenizers")
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = Decoder(read_hf_config(folder))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        out = [1]
        for _ in range(12):
            out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
        assert tokenizer.decode(out).strip().startswith("Once upon a time")


class TestBuffers:
    @pytest.mark.parametrize("variant", ["plain", "llama3-rope", "linear-rope"])
    def test_after_to_empty_they_are_as_if_constructed(self, variant: str):
        """meta -> to_empty -> reset_buffers is how every run builds its model."""
        config = config_of(VARIANTS[variant][0])
        direct = Decoder(config)
        with torch.device("meta"):
            model = Decoder(config)
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(float("nan"))  # what to_empty leaves may by chance be right
        model.reset_buffers(torch.device("cpu"))
        expected = dict(direct.named_buffers())
        found = dict(model.named_buffers())
        assert expected.keys() == found.keys()
        assert expected
        for name, buffer in expected.items():
            assert found[name].device == buffer.device
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], buffer), name

    def test_they_are_not_in_the_checkpoint(self):
        model = Decoder(config_of(LLAMA))
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}

    @torch.no_grad()
    def test_the_whole_model_after_to_empty(self):
        direct = random_decoder(VARIANTS["llama3-rope"][0])
        with torch.device("meta"):
            model = Decoder(direct.config)
        model.to_empty(device="cpu")
        model.reset_buffers(torch.device("cpu"))
        model.load_state_dict(direct.state_dict())
        assert torch.equal(model(ids(direct.config)), direct(ids(direct.config)))


class TestCache:
    """Token by token with a cache gives the logits of the whole sequence."""

    @pytest.mark.parametrize(
        "variant", ["grouped-query", "tied", "mistral-window", "qwen2-window", "qwen3-layer-types"]
    )
    @torch.no_grad()
    def test_prompt_then_single_tokens(self, variant: str):
        model = random_decoder(VARIANTS[variant][0])
        input_ids = ids(model.config)
        whole, cache = model(input_ids), KVCache(model.config.num_hidden_layers, LENGTH)
        parts = [model(input_ids[:, :7], cache=cache)]
        for t in range(7, LENGTH):
            parts.append(model(input_ids[:, t : t + 1], torch.full((2, 1), t), cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=LOGIT_TOLERANCE)

    @torch.no_grad()
    def test_slots_beyond_what_is_looked_at_change_nothing(self):
        """Attention costs what it looks at: room for long answers costs nothing until they are long."""
        model = random_decoder(VARIANTS["grouped-query"][0])
        input_ids = ids(model.config)
        whole, cache = model(input_ids), KVCache(model.config.num_hidden_layers, 1000)
        for t in range(LENGTH):
            cache.look_at(t + 1)
            logits = model(input_ids[:, t : t + 1], torch.full((2, 1), t), cache=cache)
            torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=0, atol=LOGIT_TOLERANCE)
            assert cache.layers[0].reach == 64
        cache.look_at(65)
        assert cache.reach == 128
        cache.look_at(990)
        assert cache.reach == 1000

    @pytest.mark.parametrize("variant", ["grouped-query", "mistral-window"])
    @torch.no_grad()
    def test_prompts_of_unequal_lengths_padded_at_the_right(self, variant: str):
        model = random_decoder(VARIANTS[variant][0])
        input_ids, lengths = ids(model.config), torch.tensor([5, 11])
        prompts = torch.where(torch.arange(11) < lengths[:, None], input_ids[:, :11], 0)
        cache = KVCache(model.config.num_hidden_layers, LENGTH)
        last = model(prompts, cache=cache, select=lengths - 1)
        whole, rows = model(input_ids), torch.arange(2)
        assert last.shape == (2, 1, SIZES["vocab_size"])
        torch.testing.assert_close(last[:, 0], whole[rows, lengths - 1], rtol=0, atol=LOGIT_TOLERANCE)
        for step in range(8):
            at = lengths + step
            logits = model(input_ids[rows, at][:, None], at[:, None], cache=cache)
            torch.testing.assert_close(logits[:, 0], whole[rows, at], rtol=0, atol=LOGIT_TOLERANCE)


class TestInvariants:
    @pytest.mark.parametrize("variant", ["grouped-query", "mistral-window"])
    @torch.no_grad()
    def test_padding_at_the_right_changes_nothing(self, variant: str):
        model = random_decoder(VARIANTS[variant][0])
        input_ids = ids(model.config)
        padded = torch.nn.functional.pad(input_ids, (0, 9), value=0)
        torch.testing.assert_close(model(padded)[:, :LENGTH], model(input_ids), rtol=0, atol=LOGIT_TOLERANCE)

    @torch.no_grad()
    def test_a_later_token_changes_no_earlier_logit(self):
        model = random_decoder(VARIANTS["grouped-query"][0])
        input_ids = ids(model.config)
        changed = input_ids.clone()
        changed[:, 10] = (changed[:, 10] + 1) % model.config.vocab_size
        before, after = model(input_ids), model(changed)
        assert torch.equal(before[:, :10], after[:, :10])
        assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > LOGIT_TOLERANCE

    @torch.no_grad()
    def test_rows_of_a_batch_do_not_see_each_other(self):
        model = random_decoder(LLAMA)
        input_ids = ids(model.config)
        torch.testing.assert_close(model(input_ids)[1:], model(input_ids[1:]), rtol=0, atol=LOGIT_TOLERANCE)

    @torch.no_grad()
    def test_positions_are_those_that_are_given(self):
        model = random_decoder(LLAMA)
        input_ids = ids(model.config)
        positions = torch.arange(LENGTH).expand(2, -1)
        assert torch.equal(model(input_ids, positions), model(input_ids))
        # RoPE is relative: a shift of all positions changes nothing, another distance does.
        torch.testing.assert_close(model(input_ids, positions + 7), model(input_ids), rtol=0, atol=LOGIT_TOLERANCE)
        assert (model(input_ids, positions * 2) - model(input_ids)).abs().max() > 1000 * LOGIT_TOLERANCE

    def test_tied_models_have_no_head(self):
        names = {name for name, _ in random_decoder(VARIANTS["tied"][0]).named_parameters()}
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" in names
