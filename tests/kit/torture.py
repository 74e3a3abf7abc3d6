"""Texts that hold what tokenizers get wrong."""

from __future__ import annotations

import random

CONTROL = ["<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"]
TORTURE = [
    "",
    "Hello world",
    " leading",
    "  two leading",
    "trailing  ",
    " ",
    "    ",
    "\n",
    "\n\n\n",
    " \n \n",
    "\r\n\r\n",
    "\t\ttabs\t\t",
    "a\tb\nc\rd\x0be\x0cf",
    "\u00a0no\u00a0break\u2003em\u3000ideographic\u200bzero\u2028line\u2029paragraph\x85next",
    "Größe, naïve, Ærøskøbing, İstanbul, ﬁne, ǅ, ß, ẞ",
    "Привет, мир! Ελληνικά; Հայերեն ქართული",
    "日本語のテキスト、漢字とカタカナ。한국어 텍스트 中文混合English",
    "שלום עולם مرحبا بالعالم ١٢٣ ۴۵۶ \u202eRTL override\u202c",
    "हिन्दी पाठ, ไทยไม่มีช่องว่าง, தமிழ், አማርኛ, ᏣᎳᎩ",
    "e\u0301 vs é, a\u0323\u0307 vs a\u0307\u0323, Å Å Å, \u1100\u1161\u11a8 vs 각, Z\u0351\u0352\u0353a\u0334lgo",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308",
    "🇩🇪🇫🇷 \u263a\ufe0f ☺ 1\ufe0f\u20e3 \U0001f9d1\U0001f3ff\u200d\U0001f680\U0001fae8",
    "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 𒀀𒀁 𐍈 \U0010ffff \ue000 \ufeff \ufffd",
    "\x00\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "0 12 123 1234 12345 1,234,567.89 3.14e-10 0xDEADBEEF ½ ² ₃ Ⅷ 二〇二四 1st 2nd",
    "it's we're I'VE you'll 'Tis don'T ''quoted'' “curly\u2019s”",
    "def f(x):\n    if x:\n\treturn {'a': [1, 2], \"b\": x**2}  # comment\n\n\n    return None\n",
    "<html>&amp;<!-- x --></html> $\\frac{a}{b}$ C:\\path\\n https://a.b/c?d=e&f=g#h user@host -->>> ==!= ..... ----",
    "a.b.c... !!! ??? ,,, ;:;: (((nested))) [[x]] {{y}} ~`@#$%^&*_+|",
    "▁▁ already ▁ there▁",
    "x" * 3000,
    " " * 3000,
    "ab" * 2000 + "\n" * 500,
    "日" * 1500,
    "🚀" * 400,
    "1" * 1000,
    "word " * 1000,
    "no" + "space" * 1500,
    *(f"before {c} after{c}{c}\n{c}" for c in CONTROL),
    "<|eot_id|", "<|eot_id |>", "< s>", "<|im_start|>user\nhi<|im_end|>\n", "[INST] x [/INST]", "<<SYS>>",
]  # fmt: skip
_RANDOM = random.Random(0)
TORTURE += ["".join(_RANDOM.choices("aZ é日\n\t 1🚀'<|>/s_▁\u0301", k=40)) for _ in range(60)]
