r"""When two answers of the MATH benchmark are the same: by Hendrycks' normalisation, and by math-verify beside it.

The normalisation is that of the benchmark's paper, with its peculiarities, since published figures were made with it:
it compares spellings, not values (0.5 is \frac{1}{2}, but 0.25 is not \frac{1}{4}).
"""

from __future__ import annotations

import functools
import importlib.util
import re

_REMOVED = (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")
_WHOLE = r"0|-?[1-9][0-9]*"  # a number as it is usually written


def same_answer(answer: str, reference: str) -> bool:
    """Whether two spellings are the same after Hendrycks' normalisation."""
    return normalised(answer) == normalised(reference)


def normalised(answer: str) -> str:
    """The form in which answers are compared, in the order of the published steps: the later ones see what the earlier
    ones left."""
    if answer.count(r"\text{ ") > 1:
        return answer  # more than one unit: the published script compares such answers as they are
    text = answer.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for word in _REMOVED:
        text = text.replace(word, "")
    text = text.split(r"\text{ ")[0]  # a unit behind the number
    text = text.replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    left, equals, right = text.partition("=")  # "k = 5"
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    text = _braced_fractions(text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(rf"^({_WHOLE})/({_WHOLE})$", r"\\frac{\1}{\2}", text)


def _braced_fractions(text: str) -> str:
    r"""\frac12, \frac1{72} -> \frac{1}{2}, \frac{1}{72}. One that lacks its second part leaves the whole alone."""
    first, *parts = text.split(r"\frac")
    done = first
    for part in parts:
        if part.startswith("{"):
            done += r"\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            done += rf"\frac{{{part[0]}}}{part[1:]}"
        else:
            done += rf"\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return done


@functools.cache
def has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def verified(output: str, extracted: str | None, reference: str) -> bool:
    """math-verify's verdict: on the answer that was extracted, else on whatever it finds in the output."""
    from math_verify import parse, verify  # of the extra "eval"

    gold = parse(f"${reference}$")
    return bool(verify(gold, parse(output if extracted is None else f"${extracted}$")))
