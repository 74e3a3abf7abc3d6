"""A token ends where a response begins: what generation starts from begins what is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.datasets import build_dataset
from tests.kit.tokenizers import pieces_directory, tiktoken_directory
from titan_hd.config.job_config import Data
from titan_hd.data.text.borders import CUT, SHARED, encode_with_borders
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer

KINDS = ("llama3_1_hf", "qwen2_5_hf", "gpt2_hf", "llama2_tokenizer.model", "mistral_tokenizer.model.v1")
# Prompts and responses that merge, with one vocabulary or another.
PAIRS = [
    ("### Response:", "Natalia sold 24."),
    ("### Response:", "(a) yes"),
    ("### Response:", "-5"),
    ("### Response:", "\\boxed{3}"),
    ("### Response:", "\nLima"),
    ("hi ", "ho"),
    ("a\n", "\n\nb"),
    ("1", "2345"),
    ("the bro", "wn fox"),
    ("e", "\u0301t\u00e9"),  # an accent for the prompt's last letter
    ("日", "本 🚀"),
    ("\ud83d\ude80".encode("utf-16", "surrogatepass").decode("utf-16"), "\u200d🚀"),
    ("x = f(", ") + 1"),
    ("", "alone"),
    ("only", " "),
    ("don", "'t </s> stop"),
]
PIECES = ["the", "th", "e", " ", "  ", "\n", "fox", "12", "3", "é", "日", "</s>"]


def real(shared_data: Path, name: str, folder: Path) -> Tokenizer:
    path = shared_data / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    if path.is_dir():
        return load_tokenizer(path)
    (folder / "tokenizer.model").write_bytes(path.read_bytes())
    return load_tokenizer(folder)


def check(tokenizer: Tokenizer, prompt: str, response: str) -> bool:
    """What must hold of a record; returns whether it had to be cut."""
    template = load_template("none", tokenizer)
    trained, front = template.encode(tokenizer, prompt, "", response), template.prompt_ids(tokenizer, prompt, "")
    assert trained.ids[: len(front)] == front
    assert trained.spans == [(len(front), len(trained.ids))]
    assert trained.ids[-1] == tokenizer.eos_id
    bos = 0 if tokenizer.bos_id is None else 1
    assert tokenizer.decode(trained.ids[bos:]) == tokenizer.decode(tokenizer.encode(prompt + response))
    whole = tokenizer.encode(prompt + response)
    assert (trained.ids[bos:-1] == whole) == (trained.notes == ())
    joint = load_template("none", tokenizer, joint=True).encode(tokenizer, prompt, "", response)
    assert joint.ids == [*trained.ids[:bos], *whole, tokenizer.eos_id]
    assert (joint.notes == (SHARED,)) == (trained.notes == (CUT,))
    return bool(trained.notes)


@pytest.mark.parametrize("name", KINDS)
def test_published_tokenizers(shared_data: Path, tmp_path: Path, name: str):
    tokenizer = real(shared_data, name, tmp_path)
    # Qwen's normalises: an accent and its letter are another character together than one behind the other.
    pairs = [pair for pair in PAIRS if name != "qwen2_5_hf" or "\u0301" not in pair[1]]
    cut = [check(tokenizer, prompt, response) for prompt, response in pairs]
    assert any(cut)


@pytest.mark.parametrize("name", KINDS)
def test_the_first_answers_of_gsm8k(shared_data: Path, tmp_path: Path, name: str):
    """52 of 200 with vocabularies of the Llama 3 and Qwen kind."""
    tokenizer, rows = real(shared_data, name, tmp_path), shared_data / "gsm8k" / "train.jsonl"
    lines = rows.read_text(encoding="utf-8").split("\n")[:200]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    for encoding, note in (("apart", CUT), ("joint", SHARED)):
        data = Data(validation=str(tmp_path / "r.jsonl"), encoding=encoding)
        records = build_dataset(data, "validation", 200_000, 4096, lambda: tokenizer)
        count = {"llama3_1_hf": 52, "qwen2_5_hf": 52}.get(name, 0)
        assert records.statistics.notes == ({note: (count, f"{tmp_path}/r.jsonl:1")} if count else {})
        begins = [records[i].input_ids[: len(ids)] == ids for i in range(200) for ids in [records.prompt_ids(i)]]
        assert begins.count(False) == (count if encoding == "joint" else 0)


class TestEveryKind:
    @pytest.fixture(scope="class", params=["json", "tiktoken", "sentencepiece"])
    def tokenizer(self, request, tmp_path_factory) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        if request.param == "sentencepiece":
            sentencepiece = pytest.importorskip("sentencepiece")
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "1 + 2 = 3"] * 5),
                model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
                minloglevel=2,
            )  # fmt: skip
            return load_tokenizer(folder)
        return load_tokenizer((pieces_directory if request.param == "json" else tiktoken_directory)(folder))

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.sampled_from(PIECES), max_size=8), st.integers(0, 8))
    def test_any_place(self, tokenizer: Tokenizer, parts: list[str], place: int):
        check(tokenizer, "".join(parts[:place]), "".join(parts[place:]))

    def test_several_borders(self, tokenizer: Tokenizer):
        text = "the the 123\n\nthe fox"
        for cuts in ([1, 5, 9], [0, len(text)], [2, 3, 4], list(range(1, len(text)))):
            encoded = encode_with_borders(tokenizer, text, cuts, special=True)
            bounds = [0, *encoded.places, len(encoded.ids)]
            assert bounds == sorted(bounds)
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
            spelled = [tokenizer.decode(encoded.ids[:stop]) for stop in bounds[1:]]
            assert spelled == ["".join(pieces[: i + 1]) for i in range(len(pieces))]


def test_a_template_file_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "t.txt").write_text("\ufeffQ: {prompt}\nA:", encoding="utf-8")
    assert load_template(str(tmp_path / "t.txt")).write("a", "") == "Q: a\nA:"


class TestParsedText:
    """data.parse_control_tokens: a chat that was rendered beforehand, in records of format text."""

    def encode(self, folder: Path, text: str, parse: bool, **settings):
        (folder / "r.jsonl").write_text(json.dumps({"text": text}) + "\n")
        tokenizer = load_tokenizer(pieces_directory(folder / "model", **settings))
        data = Data(validation=str(folder / "r.jsonl"), parse_control_tokens=parse)
        records = build_dataset(data, "validation", 500, 500, lambda: tokenizer)
        assert records[0].labels == records[0].input_ids
        return tokenizer, records[0].input_ids, records.statistics.notes

    @pytest.mark.parametrize(
        ("text", "ends"), [("a<|im_end|>b", True), ("a<|im_end|>\n", False), ("a</s>", False), ("a", True)]
    )
    def test_ids(self, tmp_path: Path, text: str, ends: bool):
        tokenizer, ids, notes = self.encode(tmp_path, text, True)
        assert (ids, notes) == ([*tokenizer.encode(text, special=True), *([tokenizer.eos_id] if ends else [])], {})

    def test_letters_are_named(self, tmp_path: Path):
        tokenizer, ids, notes = self.encode(tmp_path, "a<|im_end|>b", False)
        assert ids == [*tokenizer.encode("a<|im_end|>b"), tokenizer.eos_id]
        ((note, (count, where)),) = notes.items()
        assert note.startswith(
            "spell control tokens, as a rendered chat does; they are encoded as letters (data.parse_"
        )
        assert (count, where) == (1, f"{tmp_path / 'r.jsonl'}:1")

    def test_bos_once(self, tmp_path: Path):
        import tokenizers

        folder = tmp_path / "model"
        for text in ("</s>a", "a"):
            self.encode(tmp_path, text, True)
            library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            library.post_processor = tokenizers.processors.TemplateProcessing(
                single="</s> $A", special_tokens=[("</s>", library.token_to_id("</s>"))]
            )
            library.save(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text())
            config.update(bos_token="</s>", eos_token="<|im_end|>")
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = load_tokenizer(folder)
            data = Data(validation=str(tmp_path / "r.jsonl"), parse_control_tokens=True)
            ids = build_dataset(data, "validation", 500, 500, lambda tokenizer=tokenizer: tokenizer)[0].input_ids
            assert ids == [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]
