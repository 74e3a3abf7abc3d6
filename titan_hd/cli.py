"""`titan-hd COMMAND ...`: run_train.sh and the tools from any folder, also where titan_hd was installed from a wheel.

It computes nothing itself: `train` and `plan` become run_train.sh, every other command the script of tools/ that has
its own options.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple

from titan_hd import __version__
from titan_hd.bundle import RECIPES, ROOT, check_bundle, recipe
from titan_hd.config import manager
from titan_hd.config.keys import hint
from titan_hd.errors import UserError


class Command(NamedTuple):
    """A file of the bundle, the words in front of the user's, and what it does, in a line."""

    script: str
    words: tuple[str, ...]
    help: str


COMMANDS = {
    "train": Command("run_train.sh", (), "train; without any option the bundled quick start"),
    "evaluate": Command("tools/evaluate.py", (), "scores of a model on GSM8K, MATH, HumanEval, ..."),
    "generate": Command("tools/generate.py", (), "answers of a model to prompts, or a chat"),
    "compare": Command("tools/compare_methods.py", (), "several methods side by side, each tuned alike"),
    "plan": Command("run_train.sh", ("--job.print_plan",), "who would hold what, and the memory, without training"),
    "plot": Command("tools/plot_run.py", (), "curves of runs: pictures, and a page"),
    "export": Command("tools/convert_checkpoint.py", ("dcp-to-hf",), "a Hugging Face directory of a checkpoint"),
    "convert-checkpoint": Command(
        "tools/convert_checkpoint.py", (), "between checkpoints and Hugging Face directories"
    ),
    "convert-rwkv": Command("tools/convert_rwkv.py", (), "between BlinkDL's .pth files of RWKV-6 and the Hub's layout"),
    "download-hf": Command("tools/download_hf.py", (), "a model or a data set from the Hub"),
    "estimate-memory": Command("tools/estimate_memory.py", (), "what fits on a card"),
    "import-gguf": Command("tools/import_gguf.py", (), "a Hugging Face directory of a GGUF file"),
    "precompute-svd": Command("tools/precompute_svd.py", (), "the decompositions, ahead of a run"),
    "rank-analysis": Command("tools/rank_analysis.py", (), "rank and spectrum of what a training changed"),
    "scaling": Command("tools/scaling.py", (), "time and traffic of a run on a cluster"),
}
_MAIN = 7  # the first ones are what most users need


def main() -> None:
    """Run the command that the first argument names; exits with its status."""
    try:
        _run(sys.argv[1:])
    except UserError as error:
        manager.exit_with(str(error).splitlines())


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if argv[0] == "--version":
        print(f"titan_hd {__version__}")
        return
    name, words = argv[0], with_recipes(argv[1:])
    if name not in COMMANDS:
        raise UserError(f"{name}: unknown command{hint(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    check_bundle()
    os.environ["PYTHON"] = sys.executable  # whatever starts run_train.sh, this Python trains
    command = COMMANDS[name]
    words = [*command.words, *words]
    if command.script == "run_train.sh":
        os.execvp("bash", ["bash", str(ROOT / "run_train.sh"), *words])  # signals and the exit status are its own
    path = ROOT / command.script
    sys.argv = [f"titan-hd {name}", *words]
    sys.path.insert(0, str(path.parent))  # the libraries of one tool stand beside it
    importlib.import_module(path.stem).main()


def with_recipes(words: list[str]) -> list[str]:
    """The arguments with the name of a bundled recipe behind --config replaced by its path."""
    found = []
    for before, word in zip(["", *words], words):
        if before == "--config":
            found.append(recipe(word))
        elif word.startswith("--config="):
            found.append("--config=" + recipe(word.removeprefix("--config=")))
        else:
            found.append(word)
    return found


def help_text() -> str:
    """The commands, a line each."""
    lines = ["usage: titan-hd COMMAND ...          titan-hd COMMAND --help has its options", ""]
    for place, (name, command) in enumerate(COMMANDS.items()):
        if place == _MAIN:
            lines.append("")
        lines.append(f"  {name:<20}{command.help}")
    lines += ["", "NGPU=n is the number of workers of train, plan and evaluate. --config takes a file, or the name of"]
    lines += [f"one in {RECIPES}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
