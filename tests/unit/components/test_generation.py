"""Continuations against transformers' own, the distribution of samples, and what they must not depend on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.decoders import VARIANTS, random_decoder
from titan_hd.components import generation
from titan_hd.components.generation import Sampling, TextStream, choose, generate, stream, text_behind
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import read_hf_config

CPU = torch.device("cpu")
PROMPTS = [[5, 17, 3], [9, 8, 7, 6, 5, 44, 3, 2, 1, 60, 11], [33]]
NEW = 24


def transformers_greedy(raw: dict, weights: dict[str, torch.Tensor], prompt: list[int], stop: int | None) -> list[int]:
    """New tokens of one prompt by itself, cut before the stop token."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.generation_config.eos_token_id = stop
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(stop)] if stop in new else new


class TestGreedy:
    @pytest.mark.parametrize(
        "variant",
        ["grouped-query", "tied", "llama3-rope", "biases", "mistral-window", "qwen2-window", "qwen3-layer-types"],
    )
    def test_transformers_gives_the_same_tokens(self, variant: str):
        """Prompts of unequal lengths in one batch, against each one by itself; one row ends early."""
        raw = VARIANTS[variant][0]
        model = random_decoder(raw, seed=3)  # varied texts
        free = generate(model, PROMPTS, (), NEW, CPU)
        stop = next(token for token in free[1] if token not in free[0])
        rows = generate(model, PROMPTS, {stop}, NEW, CPU)
        assert len(rows[1]) < len(rows[0]) == NEW
        for prompt, row in zip(PROMPTS, rows):
            assert row == transformers_greedy(raw, model.state_dict(), prompt, stop)

    def test_a_real_pretrained_model_tells_a_story(self, shared_data: Path):
        folder = shared_data / "stories260k-hf"
        model, tokenizer = Decoder(read_hf_config(folder)), load_tokenizer(folder)
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict(weights)
        prompts = [[1], [1, *tokenizer.encode("Lily and her dog went to the"), 403]]
        rows = generate(model, prompts, tokenizer.stop_ids, NEW, CPU)
        assert tokenizer.decode(rows[0]).strip().startswith("Once upon a time")
        for prompt, row in zip(prompts, rows):
            assert row == transformers_greedy(model.config.hf, weights, prompt, tokenizer.eos_id)

    def test_rows_end_at_any_stop_token_or_at_the_limit(self):
        model = random_decoder(VARIANTS["grouped-query"][0])
        free = generate(model, PROMPTS, (), NEW, CPU)
        assert [len(row) for row in free] == [NEW] * 3
        for row in range(3):
            stops = {free[row][4], free[row][7]}
            end = next(i for i, token in enumerate(free[row]) if token in stops)
            assert generate(model, PROMPTS, stops, NEW, CPU)[row] == free[row][:end]
        assert generate(model, PROMPTS[:1], {free[0][0]}, NEW, CPU) == [[]]
        assert generate(model, PROMPTS, (), 3, CPU) == [row[:3] for row in free]

    def test_stream_gives_the_tokens_step_by_step(self):
        model = random_decoder(VARIANTS["grouped-query"][0])
        stop = generate(model, PROMPTS, (), NEW, CPU)[1][5]
        rows = generate(model, PROMPTS, {stop}, NEW, CPU)
        for step, tokens in enumerate(stream(model, PROMPTS, {stop}, NEW, CPU)):
            assert tokens == [row[step] if step < len(row) else None for row in rows]

    def test_no_more_passes_than_needed(self):
        """Once a row that had ended could keep the others' batch alive."""
        model = random_decoder(VARIANTS["grouped-query"][0])
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        first = generate(model, PROMPTS[:1], (), 5, CPU)[0]
        assert len(passes) == 5
        stop = next(i for i in range(1, 5) if first[i] not in first[:i])
        passes.clear()
        generate(model, PROMPTS[:1], {first[stop]}, 5, CPU)
        assert len(passes) == stop + 1

    def test_rows_that_have_ended_leave_the_batch(self):
        """The passes get smaller, and the tokens stay those of each prompt by itself."""
        model = random_decoder(VARIANTS["grouped-query"][0], seed=3)
        prompts = [[i, *range(i % 5 + 1)] for i in range(1, 12)]
        stops = range(0, model.config.vocab_size, 20)
        alone = [generate(model, [prompt], stops, NEW, CPU)[0] for prompt in prompts]
        sizes = []
        model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        assert generate(model, prompts, stops, NEW, CPU) == alone
        assert len({len(row) for row in alone}) > 3
        for step, size in enumerate(sizes):  # in pass n are the rows that have at least n tokens, and few others
            going = sum(len(row) >= step for row in alone)
            assert going <= size < going / (1 - generation._LEAVING_SHARE) + 1

    def test_a_row_ends_where_the_caller_says_so(self):
        """Behind the token that made it end, without waiting for the others."""
        model = random_decoder(VARIANTS["grouped-query"][0], seed=3)
        free = generate(model, PROMPTS, (), NEW, CPU)
        ends = {row[index] for row, index in zip(free, (3, 5, 7))}
        cut = [row[: next(i for i, token in enumerate(row) if token in ends) + 1] for row in free]
        passes = []
        model.register_forward_hook(lambda *_: passes.append(1))
        assert generate(model, PROMPTS, (), NEW, CPU, ended=lambda row: row[-1] in ends) == cut
        assert len(passes) == max(map(len, cut)) < NEW

    def test_an_empty_prompt_is_refused(self):
        model = random_decoder(VARIANTS["plain"][0])
        with pytest.raises(UserError, match="prompt 8: is empty"):
            generate(model, [[1], []], (), NEW, CPU, first_index=7)

    def test_logits_that_are_not_finite_are_an_error(self):
        model = random_decoder(VARIANTS["plain"][0])
        with torch.no_grad():
            model.model.embed_tokens.weight[44] = float("nan")  # a token of the second prompt alone
        assert len(generate(model, PROMPTS[:1], (), 1, CPU)[0]) == 1
        with pytest.raises(FloatingPointError, match="new token 1: the logits are not finite"):
            generate(model, PROMPTS, (), 1, CPU)

    def test_a_text_beyond_the_context_is_warned_about_once(self, monkeypatch):
        said: list[str] = []
        monkeypatch.setattr(generation.logger, "warning", lambda text, *args: said.append(text % args))
        generation._warn_of_length.cache_clear()
        model = random_decoder({**VARIANTS["plain"][0], "max_position_embeddings": 13})
        generate(model, PROMPTS, (), 2, CPU)  # 11 + 2
        assert said == []
        generate(model, PROMPTS, (), 4, CPU)
        generate(model, PROMPTS, (), 4, CPU)
        assert said == ["the text is longer than max_position_embeddings of config.json, 13 tokens"]


LOGITS = torch.tensor([2.0, -1.0, 0.5, 2.0, -3.0, 1.0, 0.0, 0.9])
# The 99.9th percentile of chi-square with 7 degrees of freedom (fewer tokens have a lower one); seeds are fixed.
CHI_SQUARE = 24.3
SAMPLES = 20_000


def allowed(sampling: Sampling) -> torch.Tensor:
    """Probabilities by transformers' own processors."""
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = LOGITS[None].double()
    steps = [process.TemperatureLogitsWarper(sampling.temperature)]
    steps += [process.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [process.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for step in steps:
        scores = step(None, scores)
    return scores[0].softmax(-1)


class TestSampling:
    @pytest.mark.parametrize(
        "sampling",
        [
            Sampling(1.0),
            Sampling(0.5, seed=1),
            Sampling(2.5, seed=2),
            Sampling(1.0, top_k=3, seed=3),
            Sampling(1.0, top_p=0.7, seed=4),
            Sampling(1.5, top_k=6, top_p=0.8, seed=5),
        ],
        ids=str,
    )
    def test_frequencies_are_the_probabilities(self, sampling: Sampling):
        draws = [generation.draw(sampling.seed, index, 0) for index in range(SAMPLES)]
        chosen = choose(LOGITS.expand(SAMPLES, -1), sampling, draws)
        counts = torch.bincount(chosen, minlength=len(LOGITS)).double()
        expected = allowed(sampling) * SAMPLES
        assert (counts[expected == 0] == 0).all()
        possible = expected > 0
        assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < CHI_SQUARE

    def test_draws_of_neighbours_are_independent(self):
        """Indices and steps that follow each other: uniform, and uncorrelated to three standard deviations."""
        draws = torch.tensor([[generation.draw(0, i, s) for s in range(200)] for i in range(200)])
        assert abs(draws.mean() - 0.5) < 3 * 12**-0.5 / 200
        for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
            assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 3 / 200

    @pytest.mark.parametrize(
        "sampling",
        [Sampling(), Sampling(1e-300), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-12), Sampling(0.0, 5, 0.5)],
        ids=str,
    )
    def test_what_comes_to_greedy(self, sampling: Sampling):
        logits = torch.stack((LOGITS + torch.arange(8) / 10, -LOGITS, LOGITS.bfloat16().float()))
        assert choose(logits, sampling, [0.0, 0.5, 0.0]).tolist() == logits.argmax(-1).tolist()
        if sampling.top_k != 1 and sampling.temperature != 1e-300:
            return
        assert choose(logits[:2], sampling, [1 - 2**-53] * 2).tolist() == logits[:2].argmax(-1).tolist()

    def test_more_than_the_vocabulary_is_all_of_it(self):
        draws = [i / 1000 for i in range(1000)]
        logits = LOGITS.expand(1000, -1)
        everything = choose(logits, Sampling(1.0), draws)
        assert len(everything.unique()) == 8
        assert torch.equal(choose(logits, Sampling(1.0, top_k=1000), draws), everything)
        assert torch.equal(choose(logits, Sampling(1.0, top_k=8), draws), everything)

    def test_equal_logits(self):
        logits, draws = torch.zeros(8, 8), [i / 8 for i in range(8)]
        assert choose(logits, Sampling(), draws).tolist() == [0] * 8
        assert choose(logits, Sampling(1.0), draws).tolist() == list(range(8))
        assert choose(logits, Sampling(1.0, top_k=2), draws).tolist() == [0] * 4 + [1] * 4

    def test_the_largest_draw_is_still_a_token(self):
        """Sums of probabilities end a little below or above 1."""
        logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
        for sampling in (Sampling(1.0), Sampling(0.3, top_p=0.9), Sampling(3.0, top_k=17)):
            chosen = choose(logits, sampling, [1 - 2.0**-53] * 50)
            assert chosen.min() >= 0
            assert chosen.max() < 1000

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_rows_that_are_not_finite_are_marked(self, temperature: float):
        rows = LOGITS.repeat(5, 1)
        rows[1, 3], rows[2, 3], rows[3], rows[4, 3] = float("nan"), float("inf"), -float("inf"), -float("inf")
        chosen = choose(rows, Sampling(temperature), [0.1] * 5).tolist()
        assert [token < 0 for token in chosen] == [False, True, True, True, False]

    @pytest.mark.parametrize(
        ("values", "line"),
        [
            ({"temperature": -0.1}, "temperature: must be a number from 0, not -0.1"),
            ({"temperature": float("nan")}, "temperature: must be a number from 0, not nan"),
            ({"temperature": float("inf")}, "temperature: must be a number from 0, not inf"),
            ({"top_k": -1}, r"top_k: must be a whole number from 0 \(all tokens\), not -1"),
            ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, not 0.0"),
            ({"top_p": 1.5}, "top_p: must be above 0 and at most 1, not 1.5"),
        ],
    )
    def test_values_out_of_range(self, values: dict, line: str):
        with pytest.raises(UserError, match=line):
            Sampling(**values)

    def test_a_row_does_not_depend_on_its_batch(self):
        model = random_decoder(VARIANTS["grouped-query"][0])
        sampling = Sampling(1.0, top_k=20, top_p=0.95, seed=7)
        rows = generate(model, PROMPTS, (), NEW, CPU, sampling)
        for index, prompt in enumerate(PROMPTS):
            assert generate(model, [prompt], (), NEW, CPU, sampling, first_index=index) == [rows[index]]
        assert generate(model, PROMPTS[1:], (), NEW, CPU, sampling, first_index=1) == rows[1:]

    def test_keys_take_the_place_of_numbers(self):
        """A sample depends on its key, whatever stands beside it and ends before it."""
        model = random_decoder(VARIANTS["grouped-query"][0])
        sampling, keys, stops = Sampling(1.0, seed=7), ["gsm8k/0/0", "gsm8k/0/1", "math/0/0"], range(20)
        rows = generate(model, [PROMPTS[0]] * 3, stops, NEW, CPU, sampling, keys=keys)
        assert len(set(map(tuple, rows))) == 3
        for key, row in zip(keys, rows):
            assert generate(model, [PROMPTS[0]], stops, NEW, CPU, sampling, first_index=5, keys=[key]) == [row]

    def test_samples_differ_by_seed_and_by_index(self):
        model = random_decoder(VARIANTS["grouped-query"][0])
        first, second = generate(model, [PROMPTS[0]] * 2, (), NEW, CPU, Sampling(1.0))
        (other,) = generate(model, [PROMPTS[0]], (), NEW, CPU, Sampling(1.0, seed=1))
        assert len({tuple(first), tuple(second), tuple(other)}) == 3


def byte_directory(folder: Path) -> Path:
    """A tokenizer.json with a token for each byte: characters beyond ASCII are several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


TEXT = "naïve 日本語, 🚀👩‍🚀! \n\n  end"


class TestTextStream:
    def test_characters_come_whole(self, tmp_path: Path):
        tokenizer = load_tokenizer(byte_directory(tmp_path))
        ids = tokenizer.encode(TEXT)
        assert len(ids) == len(TEXT.encode())
        text = TextStream(tokenizer, tokenizer.encode("é"))
        pieces = [piece for piece in map(text.add, ids) if piece]
        assert pieces == list(TEXT)
        assert text.end() == ""

    def test_broken_bytes_come_when_it_is_clear_that_they_are(self, tmp_path: Path):
        tokenizer = load_tokenizer(byte_directory(tmp_path))
        whole = tokenizer.encode("日a日")
        broken = [whole[0], whole[3], *whole[4:6]]  # a first byte, "a", two bytes of three
        text = TextStream(tokenizer, [])
        assert [text.add(token) for token in broken] == ["", "\ufffda", "", ""]
        assert text.end() == tokenizer.decode(whole[4:6])
        assert text.end() == ""

    @pytest.mark.parametrize("cut", range(1, 12))
    def test_spaces_of_sentencepiece(self, cut: int):
        """Decoded by themselves the new tokens would lose the space in front."""
        folder = Path(__file__).parents[3] / "assets" / "quickstart" / "model"
        tokenizer = load_tokenizer(folder)
        ids = [tokenizer.bos_id, *tokenizer.encode("Anna has 39 stamps.  She — 日本 — loses 12.")]
        text = TextStream(tokenizer, ids[:cut])
        joined = "".join(map(text.add, ids[cut:])) + text.end()
        assert text_behind(tokenizer, ids[:cut], ids[cut:]) == joined
        assert tokenizer.decode(ids[:cut]) + joined == tokenizer.decode(ids)
