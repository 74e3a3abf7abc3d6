"""What a user is told."""

from __future__ import annotations

import pytest


def message(call, *args, **kwargs) -> str:
    """The one line with which a call fails."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
