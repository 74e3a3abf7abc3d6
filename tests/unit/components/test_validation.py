"""Answers are read off generated text as the evaluation protocols do."""

from __future__ import annotations

import pytest

from titan_hd.components.validation import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 4 + 3 = 7\nThe answer is: 7", "7"),
        ("The answer is: 7\n", "7"),
        ("The answer is: 7 \nand more", "7"),
        ("The answer is: 3. No: The answer is: 7", "7"),
        ("The answer is: ", ""),
        ("the answer is: 7", None),
        ("7", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None):
    """Text after the last marker, up to the end of its line."""
    assert final_answer(text, "The answer is: ") == answer
