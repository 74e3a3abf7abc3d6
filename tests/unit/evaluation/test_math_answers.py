"""Hendrycks' normalisation, step by step, and where math-verify sees more than spelling."""

from __future__ import annotations

import pytest

from titan_hd.evaluation.math_answers import normalised, same_answer, verified


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{3}4", r"\frac{3}4"),
        (r"3/4", r"\frac{3}{4}"),
        ("-3/4", r"\frac{-3}{4}"),
        ("0/4", r"\frac{0}{4}"),
        ("03/4", "03/4"),
        ("-0/4", "-0/4"),
        ("3/4x", "3/4x"),
        (f"{'9' * 5000}/4", rf"\frac{{{'9' * 5000}}}{{4}}"),
        ("0.5", r"\frac{1}{2}"),
        (".25", "0.25"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$12\!,000", "12,000"),
        (r"50\%", "50"),
        (r"12\text{ cm}", "12"),
        ("x = 5", "5"),
        ("total = 5", "total=5"),
        (r"\frac", r"\frac"),
        (r"\frac1+\frac12", r"\frac{1}{+}\frac{1}{2}"),
        ("", ""),
    ],
)
def test_normalised(answer: str, form: str):
    assert normalised(answer) == form


def test_spellings_and_not_values():
    assert same_answer(r"\dfrac{1}{2}", "0.5")
    assert not same_answer("0.25", r"\frac{1}{4}")


def test_math_verify_compares_values():
    pytest.importorskip("math_verify")
    assert verified("", "0.25", r"\frac{1}{4}")
    assert not verified("", "0.26", r"\frac{1}{4}")
    assert verified(r"I think it is $\boxed{\frac14}$", None, r"\frac{1}{4}")
