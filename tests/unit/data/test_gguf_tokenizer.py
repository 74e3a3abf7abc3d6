"""The tokenizer that comes out of a GGUF file gives the ids of the published one that was written into it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from titan_hd.data.gguf_tokenizer import _PRE_TOKENIZERS, write_tokenizer
from titan_hd.models.gguf import GGUFModel

from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError

gguf = pytest.importorskip("gguf")

TEXTS = [
    "Hello world",
    "  two  spaces,\ttabs \n\n new lines\r\n   and trailing   ",
    "I'll pay $1,234,567.89 in 2025 -- that's 100% (or 3/4)!",
    "Ünïcödé, ﬁne e\u0301 and é, 中文字符, العربية, 🤗👩‍👩‍👧, \u00a0\u200b",
    "def f(x):\n    return x**2  # comment\n",
    "DON'T SHOUT 'S 'LL",
    "",
    " ",
    "\n",
    "▁under▁score",
    "ab<|im_end|>cd<|eot_id|></s>",
]


def write_model(path: Path, tokens: list[str], types: list[int], **tokenizer) -> GGUFModel:
    """A llama of one layer and four channels with this vocabulary; tokenizer: GGUFWriter.add_NAME(value)."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"context_length": 64, "embedding_length": 4, "block_count": 1, "feed_forward_length": 4}
    for name, value in {**numbers, "head_count": 1, "layer_norm_rms_eps": 1e-5}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in tokenizer.items():
        getattr(writer, f"add_{name}")(value)
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in linears:
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((4, 4), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(4, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFModel(path)


def from_tokenizer_json(path: Path, folder: Path, pre: str, **tokenizer) -> GGUFModel:
    """What llama.cpp's converter keeps of a byte-level tokenizer.json; missing ids become rows of padding."""
    published = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    kinds = {i: (token, 1) for token, i in published["model"]["vocab"].items()}
    kinds |= {t["id"]: (t["content"], 3 if t["special"] else 4) for t in published["added_tokens"]}
    rows = [kinds.get(i, (f"[PAD{i}]", 5)) for i in range(max(kinds) + 17)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in published["model"]["merges"]]
    tokens, types = zip(*rows)
    return write_model(
        path,
        list(tokens),
        list(types),
        tokenizer_model="gpt2",
        tokenizer_pre=pre,
        token_merges=merges,
        eos_token_id=rows.index(tokenizer.pop("eos")),
        **tokenizer,
    )


@pytest.mark.parametrize(
    ("folder", "pre"), [("llama3_1_hf", "llama-bpe"), ("qwen2_5_hf", "qwen2"), ("gpt2_hf", "gpt-2")]
)
def test_splits_as_published(shared_data: Path, folder: str, pre: str):
    """The rule that the file only names, without writing and reading 280,147 merges."""
    published = tokenizers.Tokenizer.from_file(str(shared_data / "tokenizers" / folder / "tokenizer.json"))
    for text in TEXTS:
        split = published.pre_tokenizer.pre_tokenize_str(text)
        assert _PRE_TOKENIZERS[pre]()["splitter"].pre_tokenize_str(text) == split


# The gguf package reads strings one by one: Llama 3's take half a minute.
@pytest.mark.parametrize(
    ("folder", "pre", "eos", "bos"),
    [
        pytest.param("llama3_1_hf", "llama-bpe", ("<|eot_id|>", 3), 128000, marks=pytest.mark.slow),
        pytest.param("qwen2_5_hf", "qwen2", ("<|im_end|>", 3), None, marks=pytest.mark.slow),
        ("gpt2_hf", "gpt-2", ("<|endoftext|>", 3), None),
    ],
)
def test_byte_level(shared_data: Path, tmp_path: Path, folder: str, pre: str, eos: tuple, bos: int | None):
    path = shared_data / "tokenizers" / folder
    settings = {"bos_token_id": bos} if bos else {}
    write_tokenizer(from_tokenizer_json(tmp_path / "model.gguf", path, pre, eos=eos, **settings), tmp_path)
    published = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.get_vocab() == published.get_vocab()
    for text in TEXTS:
        ids = published.encode(text).ids
        assert again.encode(text).ids == ids, text
        assert again.decode(ids) == published.decode(ids)
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (bos, published.token_to_id(eos[0]))


@pytest.mark.parametrize("file", ["llama2_tokenizer.model", "mistral_tokenizer.model.v1"])
def test_sentencepiece(shared_data: Path, tmp_path: Path, file: str):
    """Merges ranked by score and bytes for unknown characters: the ids of the sentencepiece library itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    published = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "tokenizers" / file))
    ids = range(published.vocab_size())
    types = [
        2 if published.is_unknown(i) else 3 if published.is_control(i) else 6 if published.is_byte(i) else 1
        for i in ids
    ]
    model = write_model(
        tmp_path / "model.gguf",
        [published.id_to_piece(i) for i in ids],
        types,
        tokenizer_model="llama",
        tokenizer_pre="default",
        token_scores=[published.get_score(i) for i in ids],
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
    )
    write_tokenizer(model, tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)
    for text in TEXTS:
        assert ours.encode(text) == published.encode(text), text
        assert ours.decode(published.encode(text)) == published.decode(published.encode(text))
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("</s>").ids == [1, 2]  # as the published tokenizer.json has it, unlike sentencepiece


class TestRefused:
    BYTES = ("a", "b", "<eos>")

    def refusal(self, tmp_path: Path, types: tuple[int, ...] = (1, 1, 3), **tokenizer) -> str:
        model = write_model(tmp_path / "model.gguf", list(self.BYTES), list(types), **tokenizer)
        with pytest.raises(UserError) as caught:
            write_tokenizer(model, tmp_path)
        return str(caught.value)

    def test_kind(self, tmp_path: Path):
        assert "tokenizer.ggml.model: 'bert' is not supported" in self.refusal(tmp_path, tokenizer_model="bert")

    @pytest.mark.parametrize("settings", [{}, {"tokenizer_pre": "tekken"}])
    def test_pre_tokenizer(self, tmp_path: Path, settings: dict):
        """A file that does not say how its texts are split is refused too: a guess would show nowhere."""
        line = self.refusal(tmp_path, tokenizer_model="gpt2", **settings)
        assert f"tokenizer.ggml.pre: {settings.get('tokenizer_pre')!r} is not supported; supported are smollm" in line

    def test_merges_of_another_vocabulary(self, tmp_path: Path):
        line = self.refusal(tmp_path, tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_merges=["a c"])
        assert "tokens and merges do not fit" in line

    def test_scores(self, tmp_path: Path):
        assert "scores: must be one number for each token" in self.refusal(tmp_path, tokenizer_model="llama")

    def test_bos_that_is_not_named(self, tmp_path: Path):
        line = self.refusal(tmp_path, tokenizer_model="gpt2", tokenizer_pre="gpt-2", add_bos_token=True)
        assert "add_bos_token is set, bos_token_id is missing" in line

    def test_id_outside(self, tmp_path: Path):
        line = self.refusal(tmp_path, tokenizer_model="gpt2", tokenizer_pre="gpt-2", eos_token_id=3)
        assert "eos_token_id: 3 is not below 3" in line
