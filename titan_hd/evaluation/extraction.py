"""The answer out of a text, by the rules of the published protocols."""

from __future__ import annotations

import re
from fractions import Fraction

from titan_hd.data.text.answers import final_answer

ANSWER = "The answer is: "
# Digits with at most one of . , / between them, as PiSSA's and MetaMath's scripts read a number; beyond theirs, the
# whole of a number with more than one comma (1,450,000, which theirs take for 1,450).
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3}){2,}|\d*[.,/]?\d+)", re.ASCII)
_CUE = "### Response:"
_PROMPT = re.compile(r"\s*(<[^<>\s]+>)?\s*Below is an instruction that describes a task")


def whole_number(text: str) -> str | None:
    """The first number behind the last "The answer is: ", rounded to a whole one; None where there is none."""
    _, marked, rest = text.rpartition(ANSWER)
    number = _NUMBER.search(rest) if marked else None
    if number is None:
        return None
    try:
        return str(round(float(Fraction(_plain(number[0])))))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _plain(number: str) -> str:
    """Without commas; where the denominator is 0, the protocol takes the numerator."""
    upper, slash, lower = number.replace(",", "").partition("/")
    return upper if slash and not lower.strip("0") else f"{upper}{slash}{lower}"


def gsm8k_reference(answer: str) -> str:
    """The number behind ####, as a whole one."""
    number = final_answer(answer, "####")
    if number is None or not re.fullmatch(r"[+-]?\d+", number.replace(",", ""), re.ASCII):
        raise ValueError("must end with #### and a whole number")
    return str(int(number.replace(",", "")))


def marked_formula(text: str) -> str | None:
    """What stands behind the last "The answer is: ", up to the first full stop that ends a line; None: nothing."""
    _, marked, rest = text.rpartition(ANSWER)
    return (rest.split(".\n")[0].strip().removesuffix(".").strip() or None) if marked else None


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}; of "\boxed 5$" what stands before the $."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("x" if text.startswith(r"\fbox", start) else "d")[2]
    if rest.startswith(" "):
        return rest[1:].split("$")[0]
    depth = 0
    for place, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return rest[1:place] if place else None
    return None


def math_reference(answer: str) -> str:
    """The boxed answer of a solution; else what MetaMath's form marks; else the answer as it is, if it is one line."""
    found = boxed(answer) or marked_formula(answer)
    if found:
        return found
    if "\n" in answer.strip():
        raise ValueError(rf'has neither \boxed{{...}} nor "{ANSWER.strip()}"')
    return answer.strip()


def first_choice(text: str, choices: str) -> str | None:
    """The first match of a pattern in an answer. Of a text that begins with its prompt, by Alpaca's heading, what is in
    front of the first "### Response:" is no answer; in any other that line is of a question that the model asks itself,
    behind its answer."""
    if _PROMPT.match(text):
        text = text.partition(_CUE)[2]
    found = re.search(choices, text)
    return found[0] if found else None
