"""Continues prompts, or chats, with a model: a Hugging Face directory, or a checkpoint of a run.

    python tools/generate.py outputs/quickstart/hf --prompt "..." --template assets/quickstart/template.txt
    python tools/generate.py outputs/run/checkpoint/step-500 --chat "Why is the sky blue?" --temperature 0.7
    python tools/generate.py MODEL --file prompts.jsonl --template alpaca > answers.jsonl
    python tools/generate.py MODEL            a chat; or, if the input is no terminal, its lines are the prompts

Prompts are written by --template; a chat by the chat template that lies beside the tokenizer. The text goes to the
standard output as it is made, the rate to the standard error. With --file the output is one JSON object a line.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_hd.checkpoint.pretrained import load_pretrained
from titan_hd.components.generation import Sampling, TextStream, generate, stream, text_behind
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.data.fields import INPUT_FIELDS, SYSTEM_FIELDS, is_given, optional_text, text_of
from titan_hd.data.formats import PROMPT_FIELDS, RESPONSE_FIELDS
from titan_hd.data.sources import read_records
from titan_hd.data.text.chat import ChatTemplate, load_chat_template
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer
from titan_hd.errors import UserError
from titan_hd.files import expand_home, user_path
from titan_hd.models.model import Model


def main() -> None:
    args = parse_arguments()
    for pipe in (sys.stdin, sys.stdout):  # what is no text is refused by the tokenizer, or shown as well as can be
        assert isinstance(pipe, io.TextIOWrapper)
        pipe.reconfigure(errors="surrogateescape" if pipe is sys.stdin else "replace")
    try:
        run(args)
    except (UserError, FloatingPointError) as error:
        manager.exit_with(str(error).splitlines())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("model", type=user_path, help="a HF directory, or a checkpoint's folder, .../step-N")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="what to continue")
    what.add_argument("--chat", metavar="TEXT", help="the user's first message")
    what.add_argument(
        "--file", type=user_path, help="prompts: .jsonl (instruction, query, question or prompt), else lines"
    )
    add("--system", metavar="TEXT", help="the system message of a chat")
    add(
        "--template",
        type=expand_home,
        help="of prompts: alpaca, pissa, chat, none (the default) or a file with {prompt}",
    )
    add(
        "--assets",
        default="",
        type=expand_home,
        help="for a checkpoint: the HF directory with config and tokenizer, if not the run's",
    )
    add("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer; default: 256")
    add("--temperature", type=float, default=0.0, help="0, the default: always the most probable token")
    add("--top-p", type=float, default=1.0, metavar="P", help="of the fewest tokens that have it together")
    add("--top-k", type=int, default=0, metavar="K", help="0, the default: all")
    add("--seed", type=int, default=0, help="of what is drawn; default: 0")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts of --file at a time")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="default: the GPU if there is one")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Check what is cheap to check, load the model, then do what is asked for."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be a whole number above 0, not {getattr(args, name)}")
    asks_prompts = args.prompt is not None or args.file or (args.chat is None and not sys.stdin.isatty())
    for key, wrong, use in (("system", asks_prompts, "a chat"), ("template", not asks_prompts, "prompts")):
        if wrong and getattr(args, key) is not None:
            raise UserError(f"--{key}: is for {use}")
    load_template(args.template or "none")
    records = read_prompts(args.file) if args.file else []
    device = pick_device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model, assets = load_pretrained(args.model, args.assets, getattr(torch, dtype), device)
    tokenizer = load_tokenizer(assets).fitting(model.config.vocab_size)
    session = Session(model, tokenizer, sampling, args.max_new_tokens, device)
    if not asks_prompts:
        session.chat(args.chat, args.system)
    elif args.file:
        session.answer_file(records, args.template or "none", args.batch_size)
    else:
        texts = (
            [args.prompt]
            if args.prompt is not None
            else (line.rstrip("\n").removeprefix("\ufeff") for line in sys.stdin)
        )
        template = load_template(args.template or "none", tokenizer)
        for index, text in enumerate(texts):
            session.answer(template.prompt_ids(tokenizer, text, ""), template.stop_ids(tokenizer), index)


def pick_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: must be cpu, cuda or cuda:N, not {name}")
    return device


def read_prompts(path: Path) -> list[tuple[str, str, str]]:
    """(Prompt, input, system text) of each record of a .jsonl file, or of each line that is not empty of any other."""
    if path.suffix != ".jsonl":
        try:
            # A byte order mark is no part of a prompt, and what else Unicode calls the end of a line is.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        return [(line, "", "") for line in lines if line.strip()]
    prompts = []
    unused: dict[str, None] = {}
    for record in read_records(str(path), "--file"):
        field = next((name for name in PROMPT_FIELDS if name in record), None)
        if field is None:
            raise UserError(f"{record.where}: needs one of {', '.join(PROMPT_FIELDS)}")
        try:
            prompt = text_of(record, field)
            (extra_field, extra), (system_field, system) = (
                optional_text(record, names) for names in (INPUT_FIELDS, SYSTEM_FIELDS)
            )
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None
        prompts.append((prompt, extra, system))
        others = record.keys() - {field, extra_field, system_field, *RESPONSE_FIELDS}
        unused |= dict.fromkeys(name for name in sorted(others) if is_given(record[name]))
    if unused:
        print(f"{path}: fields that are not used: {', '.join(unused)}", file=sys.stderr)
    return prompts


@dataclass
class Session:
    model: Model
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int
    device: torch.device

    def answer(self, prompt: list[int], stop_ids: Collection[int], index: int) -> str:
        """Continue one prompt on the standard output; returns the text."""
        started = time.perf_counter()
        text, pieces, times = TextStream(self.tokenizer, prompt), [], []
        for (token,) in stream(
            self.model, [prompt], stop_ids, self.max_new_tokens, self.device, self.sampling, first_index=index
        ):
            times.append(time.perf_counter())
            assert token is not None  # a stream ends with its last row
            pieces.append(text.add(token))
            print(pieces[-1], end="", flush=True)
        pieces.append(text.end())
        print(pieces[-1], flush=True)
        if len(times) > 1:
            rate = (len(times) - 1) / (times[-1] - times[0])
            first = times[0] - started
            report = f"{len(times)} tokens, {rate:.1f} tokens/s; before them a prompt of {len(prompt)} in {first:.2f} s"
            print(report, file=sys.stderr)
        return "".join(pieces)

    def answer_file(self, records: list[tuple[str, str, str]], template_name: str, batch_size: int) -> None:
        """Continue all prompts, a batch at a time, in their order."""
        template, started, count = load_template(template_name, self.tokenizer), time.perf_counter(), 0
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            prompts = [
                template.under(system).prompt_ids(self.tokenizer, prompt, extra) for prompt, extra, system in batch
            ]
            rows = generate(
                self.model,
                prompts,
                template.stop_ids(self.tokenizer),
                self.max_new_tokens,
                self.device,
                self.sampling,
                first_index=start,
            )
            for (prompt, *_), ids, row in zip(batch, prompts, rows):
                response = text_behind(self.tokenizer, ids, row)
                print(json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False), flush=True)
            count += sum(map(len, rows))
        seconds = time.perf_counter() - started
        print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)

    def chat(self, message: str | None, system: str | None) -> None:
        """Answer one message; without one, go on asking the terminal for messages until it ends."""
        template = load_chat_template(self.tokenizer)
        stop_ids = load_template("chat", self.tokenizer).stop_ids(self.tokenizer)
        messages = [] if system is None else [{"role": "system", "content": system}]
        for index, text in enumerate([message] if message is not None else iter(ask, None)):
            messages.append({"role": "user", "content": text})
            prompt = chat_prompt(template, self.tokenizer, messages)
            messages.append({"role": "assistant", "content": self.answer(prompt, stop_ids, index)})


def chat_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer.encode(template.render(messages, add_generation_prompt=True), special=True)


def ask() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None


if __name__ == "__main__":
    main()
