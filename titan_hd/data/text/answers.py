"""The final answer of a response."""

from __future__ import annotations


def final_answer(text: str, marker: str) -> str | None:
    """What follows the last marker, up to the end of the line; None where the marker is missing."""
    _, found, answer = text.rpartition(marker)
    return answer.split("\n")[0].strip() if found else None
