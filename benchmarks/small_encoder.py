"""A small RoBERTa out of GLUE's own texts: for tasks that are too small to learn from random weights.

Of the tasks' labels nothing is used. Each step has single texts and pairs: pairs of GLUE, or a text beside one that was
made of it (words dropped, replaced or moved, a piece of another text behind). What is learned:

    of a pair, at each token      whether the other text has its word, too;
    of a pair, at the first token which share of a text's words the other has, each by number and by rarity;
    of all, at the first token    the text's own tokens;
    at masked tokens (a tenth)    what they were.

The first target is why it works: a label for each token where a task has one for two texts.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from titan_hd.data.sources import read_records
from titan_hd.models.registry import build_model, parse_hf_config
from titan_hd.models.roberta import Roberta

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
START, PADDING, END, MASK = 0, 1, 2, 4
WIDTH, BLOCKS, HEADS = 128, 3, 4
PIECES, LENGTH = 6000, 160
BATCH, LR, SINGLE, MASKED = 48, 1e-3, 0.4, 0.1
LONGEST = ((0.3, 12), (0.8, 24), (1.0, 45))  # up to which share of the steps: words of a text
# What texts the encoder learns from: folder -> file, fields. Of QNLI the training file is not needed.
TEXTS = {
    "SST-2": ("train", ("sentence",)),
    "MRPC": ("train", ("#1 String", "#2 String")),
    "CoLA": ("train", ("sentence",)),
    "RTE": ("train", ("sentence1", "sentence2")),
    "STS-B": ("train", ("sentence1", "sentence2")),
    "QNLI": ("dev", ("question", "sentence")),
}
Words = list[str]


def read_texts(glue: Path) -> list[list[str]]:
    """Of the folders that are there: one text or two of each record."""
    found = []
    for folder, (part, fields) in TEXTS.items():
        if (path := glue / folder / f"{part}.tsv").exists():
            found += [[record[field] for field in fields] for record in read_records(str(path), "--glue")]
    return found


def plain(word: str) -> str:
    """A word as it is compared: without capitals and punctuation."""
    return re.sub(r"\W", "", word.lower()) or word


# ---------------------------------------------------------------------------------------------------------------------
# The model


def write_random(folder: Path, texts: list[str], seed: int) -> Roberta:
    """A Hugging Face directory with a tokenizer of the texts, without weights; and the model with first values."""
    folder.mkdir(parents=True)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, PIECES, special_tokens=SPECIAL, show_progress=False)
    bpe.save_model(str(folder))
    raw = {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "vocab_size": bpe.get_vocab_size(),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH + PADDING + 1,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": START,
        "pad_token_id": PADDING,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    model = build_model(parse_hf_config(raw, "config.json"))
    assert isinstance(model, Roberta)
    first_values(model, seed)
    return model


@torch.no_grad()
def first_values(model: Roberta, seed: int) -> None:
    """Such that a token sees its like and its neighbours from the first step on: keys are queries, positions waves."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = model.initial(name)
        if value is None:
            parameter.normal_(0.0, WIDTH**-0.5, generator=generator)
        else:
            parameter.fill_(value)
    for layer in model.blocks():
        attention = layer.attention.self
        attention.query.weight[WIDTH // 2 :] *= 0.2  # the other heads see all tokens alike
        attention.key.weight.copy_(attention.query.weight)
    table = model.roberta.embeddings.position_embeddings.weight
    place, wave = torch.arange(len(table))[:, None], torch.arange(WIDTH // 2)
    angle = place / 200 ** (2 * wave / WIDTH)
    table.copy_(1.4 * WIDTH**-0.5 * torch.cat([angle.sin(), angle.cos()], 1))
    model.roberta.embeddings.token_type_embeddings.weight.mul_(0.2)


class Heads(nn.Module):
    """What the encoder's own training asks of its states; thrown away after it."""

    def __init__(self, model: Roberta):
        super().__init__()
        self.embedding = model.roberta.embeddings.word_embeddings
        self.matched = nn.Linear(WIDTH, 1)
        self.shares = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
        self.masked = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.own = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(2, self.embedding.weight.shape[0]))

    def pieces(self, h: torch.Tensor, which: int) -> torch.Tensor:
        """Logits over the vocabulary of states [N, D]: of masked tokens (0), of a text's own (1)."""
        return (self.masked, self.own)[which](h) @ self.embedding.weight.T + self.bias[which]


# ---------------------------------------------------------------------------------------------------------------------
# What it learns from


class Example(NamedTuple):
    """Texts as words; shares: as `Texts.shares` has them, of a pair."""

    texts: list[Words]
    shares: list[float] | None


class Texts:
    """Draws examples; all chance is `draw`'s."""

    def __init__(self, found: list[list[str]], seed: int):
        self.draw = random.Random(seed)
        records = [[text.split() for text in texts] for texts in found]
        self.singles = [words for texts in records for words in texts if 4 <= len(words) <= 40]
        self.pairs = [texts for texts in records if len(texts) == 2 and max(map(len, texts)) <= 50]
        counts = Counter(plain(word) for texts in records for words in texts for word in words)
        total = sum(counts.values())
        self.rarity = {word: math.log(total / count) for word, count in counts.items()}

    def single(self, longest: int) -> Words:
        """A text of at most so many words."""
        while len(words := self.draw.choice(self.singles)) > longest:
            pass
        return words

    def altered(self, words: Words) -> Words:
        """Some words dropped, some replaced; perhaps its parts exchanged; perhaps a piece of another text behind it."""
        share, kept = self.draw.choice([0.0, 0.1, 0.2, 0.4, 0.6]), []
        for word in words:
            chance = self.draw.random()
            if chance >= share / 2:
                kept.append(self.draw.choice(self.draw.choice(self.singles)) if chance < share else word)
        if self.draw.random() < 0.4 and len(kept) > 3:
            cut = self.draw.randrange(1, len(kept))
            kept = kept[cut:] + kept[:cut]
        if self.draw.random() < 0.3:
            other = self.draw.choice(self.singles)
            kept += other[: self.draw.randrange(1, len(other))]
        return kept or words

    def shares(self, words: Words, other: Words) -> list[float]:
        """Of the words, by number and by rarity: the share that the other text has."""
        there = {plain(word) for word in other}
        weights = {plain(word): self.rarity[plain(word)] for word in words}
        by_rarity = sum(weight for word, weight in weights.items() if word in there) / sum(weights.values())
        return [sum(plain(word) in there for word in words) / len(words), by_rarity]

    def example(self, longest: int) -> Example:
        if self.draw.random() < SINGLE:
            return Example([self.single(longest)], None)
        chance = self.draw.random()
        if self.pairs and chance < 0.35:
            texts = list(self.draw.choice(self.pairs))
        else:
            first = self.single(longest)
            texts = [first, self.altered(first) if chance < 0.85 else self.single(longest)]
        self.draw.shuffle(texts)
        one, two = (text[:longest] for text in texts)
        return Example([one, two], self.shares(one, two) + self.shares(two, one))


class Batch(NamedTuple):
    """ids [B, T]; matched [B, T]: 1 where the other text has the word, 0 where not, -1 where there is no word; shares
    [B, 4], NaN where there is one text."""

    ids: torch.Tensor
    matched: torch.Tensor
    shares: torch.Tensor


def collate(examples: list[Example], encode: Callable[[str], list[int]]) -> Batch:
    """Texts as `<s> a </s></s> b </s>`, padded at the right. encode: a word's tokens."""
    rows = []
    for example in examples:
        there = [{plain(word) for word in words} for words in example.texts]
        ids, matched = [], []
        for i, words in enumerate(example.texts):
            ids.append(END if i else START)
            matched.append(-1)
            for word in words:
                pieces = encode(word)
                ids += pieces
                matched += len(pieces) * [int(len(there) > 1 and plain(word) in there[1 - i])]
            ids.append(END)
            matched.append(-1)
        rows.append((ids[:LENGTH], matched[:LENGTH]))
    longest = max(len(ids) for ids, _ in rows)
    padded = [
        [row + (longest - len(row)) * [filler] for row in column] for column, filler in zip(zip(*rows), (PADDING, -1))
    ]
    shares = [example.shares or 4 * [math.nan] for example in examples]
    return Batch(torch.tensor(padded[0]), torch.tensor(padded[1]), torch.tensor(shares))


# ---------------------------------------------------------------------------------------------------------------------
# Its training


def states(model: Roberta, ids: torch.Tensor) -> torch.Tensor:
    """The last block's [B, T, D] of token ids [B, T]."""
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    h = model.roberta.embeddings(ids, positions)
    for block in model.blocks():
        h = block(h, (ids != PADDING)[:, None, None, :])
    return h


def losses(model: Roberta, heads: Heads, batch: Batch) -> dict[str, torch.Tensor]:
    """Mean of each target, []."""
    words = batch.matched >= 0
    masked = words & (torch.rand(words.shape) < MASKED)
    h = states(model, batch.ids.masked_fill(masked, MASK))
    pair = ~batch.shares[:, 0].isnan()
    told = words & ~masked & pair[:, None]
    own = F.log_softmax(heads.pieces(h[:, 0], 1), 1).gather(1, batch.ids)
    return {
        "matched": F.binary_cross_entropy_with_logits(heads.matched(h[told])[:, 0], batch.matched[told].float()),
        "shares": F.mse_loss(heads.shares(h[pair, 0]), batch.shares[pair]),
        "own words": -own[words].mean(),
        "masked": F.cross_entropy(heads.pieces(h[masked], 0), batch.ids[masked]),
    }


WEIGHTS = {"matched": 1.0, "shares": 4.0, "own words": 0.3, "masked": 0.2}


def write_encoder(folder: Path, glue: Path, steps: int, seed: int) -> None:
    """Train it; a Hugging Face directory with vocab.json and merges.txt."""
    found = read_texts(glue)
    model = write_random(folder, [text for texts in found for text in texts], seed)
    torch.manual_seed(seed)  # of the masks
    source, heads = Texts(found, seed), Heads(model)
    bpe = tokenizers.ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    pieces: dict[str, list[int]] = {}

    def encode(word: str) -> list[int]:
        if word not in pieces:
            pieces[word] = bpe.encode(f" {word}").ids
        return pieces[word]

    encoder = [p for name, p in model.named_parameters() if not name.startswith("classifier.")]
    trained = [*encoder, *(p for name, p in heads.named_parameters() if not name.startswith("embedding."))]
    optimizer = torch.optim.AdamW(trained, LR, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(300, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / max(1, steps)))
    )
    started, sums = time.perf_counter(), Counter()
    for step in range(1, steps + 1):
        longest = next(words for share, words in LONGEST if step <= share * steps)
        found_losses = losses(model, heads, collate([source.example(longest) for _ in range(BATCH)], encode))
        optimizer.zero_grad()
        torch.stack([WEIGHTS[name] * loss for name, loss in found_losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        sums.update({name: loss.item() for name, loss in found_losses.items()})
        if step % 200 == 0 or step == steps:
            means = ", ".join(f"{name} {total / ((step - 1) % 200 + 1):.3f}" for name, total in sums.items())
            print(f"encoder: step {step} of {steps}: {means}; {time.perf_counter() - started:.0f} s", flush=True)
            sums.clear()
    weights = {n: w.detach() for n, w in model.state_dict().items() if not n.startswith("classifier.")}
    save_file(weights, folder / "model.safetensors")
