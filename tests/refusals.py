"""What a fault says, for tests."""

from __future__ import annotations

import pytest

from dino_kit.errors import UserError


def refusal(function, *arguments, **options) -> str:
    """The sentence by which ``function`` refuses these arguments."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".") and not sentence.endswith("..") and "\n" not in sentence
    return sentence
