"""Makes the assets of the bundled quick start, all from one seed: word problems, a tokenizer and a model to pretrain.

Two commands remake everything, from the repository root:

    python -m tools.make_quickstart
    NGPU=2 ./run_train.sh --config train_configs/quickstart_pretrain.toml

The first one writes

    assets/quickstart/{train,validation}.jsonl   two-step problems: what the quick start fine-tunes on
    assets/quickstart/one_step.jsonl             one-step problems of validation: what fine-tuning may forget
    assets/quickstart/template.txt               the prompt, a newline, then the response
    outputs/quickstart_pretrain/data/*.jsonl     one-step problems and bare equations: what the model is pretrained on
    outputs/quickstart_pretrain/init/            the model before that: config, random weights, tokenizer files

The second one pretrains the model with titan_hd itself and exports it to assets/quickstart/model.

Training and validation problems are disjoint by their numbers: a checksum of the numbers that a problem computes with
decides on which side it may appear, so no combination of numbers (and hence no text) is on both.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from titan_hd.config.command_line import ToolParser
from titan_hd.models.registry import build_model, parse_hf_config

SEED = 42
ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets" / "quickstart"
PRETRAIN = ROOT / "outputs" / "quickstart_pretrain"
TEMPLATE = "{prompt}\n"

LARGEST = 99  # no number of a problem or of its solution is larger
HELD_OUT = 10  # one in so many combinations of numbers belongs to validation

NAMES = ["Tom", "Anna", "Ben", "Lily", "Max", "Emma", "Sam", "Nora", "Leo", "Mia", "Jack", "Rosa"]
THINGS = ["apples", "books", "coins", "cards", "stamps", "shells", "pens", "cups", "stones", "balls", "eggs", "keys"]
CHANGES = {  # "#" is a number
    "+": ["finds # more", "buys # more", "gets # more", "wins # more"],
    "-": ["loses #", "sells #", "breaks #", "gives away #"],
}
COMPARISONS = {"+": "more", "-": "fewer"}
ASIDES = ["A ticket costs {2} dollars.", "The bus leaves in {2} minutes.", "There are {2} people in the park."]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER_CONFIG = {  # without it transformers would add no BOS
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": False,
    "clean_up_tokenization_spaces": False,
}

# ---------------------------------------------------------------------------------------------------------------------
# Problems. A story is (sentences with {0}, {1}, {2} for its numbers, the steps of its solution). A step is (operation,
# x, y): x and y say which number of the story, or -1 for the result of the step before.

Step = tuple[str, int, int]
Story = tuple[list[str], list[Step]]


def one_step(rng: random.Random) -> Story:
    """The easy family: one sum or difference. Half of the problems have an aside with a number that does not matter;
    without it the model would learn to find its numbers by their positions, and fine-tuning would begin with that."""
    (name, other), thing, sign = rng.sample(NAMES, 2), rng.choice(THINGS), rng.choice("+-")
    kind = rng.choice(["change", "comparison", "pair"])
    if kind == "change":
        second, question = _change(rng, name, sign, 1), _how_many(thing, name, " now")
    elif kind == "comparison":
        second, question = _comparison(name, other, sign, 1), _how_many(thing, other)
    else:
        second = f"{other} has {{1}} {thing}."
        question = f"How many more {thing} does {name} have than {other}?" if sign == "-" else _together(thing)
    facts = [f"{name} has {{0}} {thing}.", second]
    if rng.random() < 0.5:
        facts.insert(rng.randint(0, 2), rng.choice(ASIDES))
    return [*facts, question], [(sign, 0, 1)]


def made_up(rng: random.Random) -> Story:
    """For pretraining only: an equation whose numbers the prompt does not tell. So the model learns to calculate from
    the equation that it is writing, which the second step of a harder problem will need."""
    sign = rng.choice("+-")
    kind = {"+": "sum", "-": "difference"}[sign]
    return [f"Make up a {kind} for {rng.choice(NAMES)} with {rng.choice(THINGS)}."], [(sign, 0, 1)]


def two_steps(rng: random.Random) -> Story:
    """The harder family: sentences of the easy one, combined so that the second step needs the first one's result."""
    (name, other), thing, sign, then = rng.sample(NAMES, 2), rng.choice(THINGS), rng.choice("+-"), rng.choice("+-")
    has = f"{name} has {{0}} {thing}."
    kind = rng.choice(["change, change", "change, comparison", "comparison, change", "comparison, together"])
    if kind == "comparison, together":
        return [has, _comparison(name, other, sign, 1), _together(thing)], [(sign, 0, 1), ("+", 0, -1)]
    if kind == "change, change":
        facts = [_change(rng, name, sign, 1), "Then " + _change(rng, name, then, 2)]
        question = _how_many(thing, name, " now")
    elif kind == "change, comparison":
        facts = [_change(rng, name, sign, 1), _comparison(name, other, then, 2)]
        question = _how_many(thing, other)
    else:
        facts = [_comparison(name, other, sign, 1), _change(rng, other, then, 2)]
        question = _how_many(thing, other, " now")
    return [has, *facts, question], [(sign, 0, 1), (then, -1, 2)]


def _change(rng: random.Random, name: str, sign: str, number: int) -> str:
    return f"{name} {rng.choice(CHANGES[sign])}.".replace("#", f"{{{number}}}")


def _comparison(name: str, other: str, sign: str, number: int) -> str:
    return f"{other} has {{{number}}} {COMPARISONS[sign]} than {name}."


def _how_many(thing: str, name: str, when: str = "") -> str:
    return f"How many {thing} does {name} have{when}?"


def _together(thing: str) -> str:
    return f"How many {thing} do they have together?"


def solve(steps: list[Step], numbers: list[int]) -> tuple[list[str], list[int]]:
    """The equations of a solution and their results."""
    equations, results = [], []
    for sign, x, y in steps:
        left, right = (results[-1] if place < 0 else numbers[place] for place in (x, y))
        results.append(left + right if sign == "+" else left - right)
        equations.append(f"{left}{sign}{right}={results[-1]}.")
    return equations, results


def is_held_out(steps: list[Step], numbers: list[int]) -> bool:
    """Whether a problem belongs to validation; the numbers that it computes with decide, in whatever order."""
    used = {place for _, *places in steps for place in places if place >= 0}
    return zlib.crc32(repr(sorted(numbers[place] for place in used)).encode()) % HELD_OUT == 0


def problems(family: Callable[[random.Random], Story], rng: random.Random, count: int, held_out: bool) -> list[dict]:
    """`count` different problems of a family, of one side of the split."""
    found: dict[tuple[str, str], None] = {}  # a set that keeps its order
    while len(found) < count:
        sentences, steps = family(rng)
        numbers = [rng.randint(2, LARGEST) for _ in range(3)]
        equations, results = solve(steps, numbers)
        if is_held_out(steps, numbers) == held_out and all(1 <= result <= LARGEST for result in results):
            response = " ".join([*equations, f"The answer is: {results[-1]}"])
            found[" ".join(sentences).format(*numbers), response] = None
    return [{"query": query, "response": response} for query, response in found]


# ---------------------------------------------------------------------------------------------------------------------
# The model before pretraining


def train_tokenizer(records: list[dict], path: Path) -> None:
    """A SentencePiece model as Llama 2's: BPE, single digits, unknown characters (and the newline) as bytes."""
    model = io.BytesIO()  # a file's name would become part of it
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for record in records for text in record.values()),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        bos_id=CONFIG["bos_token_id"],
        eos_id=CONFIG["eos_token_id"],
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def write_random_model(folder: Path) -> None:
    """config.json and seeded random weights in fp32: norms 1, everything else normal."""
    torch.manual_seed(SEED)
    model = build_model(parse_hf_config(CONFIG, "quick start"))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


# ---------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    ToolParser(__doc__).parse_args()  # there are no options; --help says what is made
    rng = random.Random(SEED)
    shutil.rmtree(PRETRAIN, ignore_errors=True)
    for folder in (ASSETS, PRETRAIN / "data", PRETRAIN / "init"):
        folder.mkdir(parents=True, exist_ok=True)
    (ASSETS / "template.txt").write_text(TEMPLATE)
    write_jsonl(ASSETS / "train.jsonl", problems(two_steps, rng, 6000, held_out=False))
    write_jsonl(ASSETS / "validation.jsonl", problems(two_steps, rng, 500, held_out=True))
    easy = problems(one_step, rng, 150_000, held_out=False) + problems(made_up, rng, 50_000, held_out=False)
    write_jsonl(PRETRAIN / "data" / "train.jsonl", easy)
    write_jsonl(ASSETS / "one_step.jsonl", problems(one_step, rng, 500, held_out=True))
    train_tokenizer(easy[::10], PRETRAIN / "init" / "tokenizer.model")
    write_random_model(PRETRAIN / "init")


if __name__ == "__main__":
    main()
