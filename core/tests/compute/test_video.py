"""Where the video and the text of a sequence are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyattn.context import forward_context
from polyattn.contract import AttentionCall, TextSpan
from polyattn.errors import InputError
from polyattn.video import VideoSequence, video_sequence


def sequence(
    tokens: int, mask: torch.Tensor | None = None, keys: int | None = None, **context: Any
) -> VideoSequence:
    q = torch.zeros(2, tokens, 1, 8)
    k = torch.zeros(2, keys or tokens, 1, 8)
    with forward_context(**context) as entered:
        call = AttentionCall(
            is_causal=False, scale=1.0, mask=mask, context=entered,
            mask_kind="none" if mask is None else "key_padding",
        )  # fmt: skip
        return video_sequence(q, k, call)


def test_video_alone() -> None:
    found = sequence(24, grid=(2, 3, 4))
    assert (found.grid, found.video, found.text, found.length) == ((2, 3, 4), 24, 0, 24)
    assert found.visible_keys(torch.device("cpu")) is None


@pytest.mark.parametrize("start", [0, 24])
def test_text_and_its_padding(start: int) -> None:
    found = sequence(29, grid=(2, 3, 4), text=TextSpan(start, 5, 2))
    assert (found.text_before, found.text_after) == ((5, 0) if start == 0 else (0, 5))
    visible = found.visible_keys(torch.device("cpu"))
    assert visible is not None
    assert visible.nonzero()[:, 1].tolist() == [
        token for token in range(29) if not start + 2 <= token < start + 5
    ]


def test_a_mask_hides_keys_too() -> None:
    mask = torch.ones(2, 1, 1, 29, dtype=torch.bool)
    mask[1, ..., 3] = False
    found = sequence(29, mask, grid=(2, 3, 4), text=TextSpan(24, 5, 4))
    visible = found.visible_keys(torch.device("cpu"))
    assert visible is not None
    assert (~visible).nonzero().tolist() == [[0, 28], [1, 3], [1, 28]]
    found = sequence(24, torch.ones(1, 1, 1, 1, dtype=torch.bool), grid=(2, 3, 4))
    assert found.visible is not None
    assert found.visible.shape == (1, 24)


@pytest.mark.parametrize(
    ("tokens", "keys", "context", "words"),
    [
        (24, None, {}, "token grid"),
        (25, None, {"grid": (2, 3, 4)}, "makes 24 tokens; q has 25"),
        (24, 23, {"grid": (2, 3, 4)}, "k 23"),
        (29, None, {"grid": (2, 3, 4), "text": TextSpan(7, 5)}, "before the video's 24 tokens"),
        (29, None, {"grid": (2, 3, 4), "text": TextSpan(24, 5, 6)}, "cannot have 6 valid"),
    ],
)
def test_what_does_not_add_up_is_refused(
    tokens: int, keys: int | None, context: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        sequence(tokens, keys=keys, **context)
