"""Seeds for generators that belong to a logical thing (a layer, an epoch, a sample) and not to a process."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: object) -> int:
    """A 64-bit seed from the parts' text: the same on every machine, unrelated for different parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
