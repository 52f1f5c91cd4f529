"""Where the video and the text of a sequence are: what every method on a token grid asks first.

A model's sequence is the grid's tokens in raster order (t slowest, w fastest), with text tokens
before them, after them, or none. :func:`video_sequence` reads that off a call's forward context and
mask, and refuses what does not add up, so that no plugin has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyattn.contract import AttentionCall
from polyattn.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["VideoSequence", "video_sequence"]

HINT = (
    "polyattn.attention(q, k, v, grid=(T, H, W)), or with polyattn.forward_context(grid=(T, H, W), "
    "text=polyattn.TextSpan(start, length)): ..."
)


@dataclass(frozen=True, slots=True)
class VideoSequence:
    """One sequence ``[text before | grid in raster order | text after]`` and its visible keys."""

    grid: tuple[int, int, int]
    """Tokens along (T, H, W)."""
    text_before: int
    """Text tokens before the grid."""
    text_after: int
    """Text tokens after the grid."""
    valid_text: int
    """Text tokens that are not padding; the padding follows them. Keys past it are hidden."""
    visible: torch.Tensor | None
    """``[B | 1, S]``: keys that may be attended, from a key-padding mask; None: all of them."""

    @property
    def length(self) -> int:
        """S: tokens of the sequence."""
        return self.video + self.text_before + self.text_after

    @property
    def video(self) -> int:
        """Tokens of the grid."""
        time, height, width = self.grid
        return time * height * width

    @property
    def text(self) -> int:
        """Text tokens, padding included."""
        return self.text_before + self.text_after

    def visible_keys(self, device: torch.device) -> torch.Tensor | None:
        """``[B | 1, S]`` bool: keys that may be attended, by the mask and by the text's padding.

        None where all may: nothing then has to be hidden.
        """
        visible = self.visible
        if self.valid_text < self.text:
            import torch

            start = (0 if self.text_before else self.video) + self.valid_text
            shown = torch.ones(1, self.length, dtype=torch.bool, device=device)
            shown[:, start : start + self.text - self.valid_text] = False
            visible = shown if visible is None else visible & shown
        return visible


def video_sequence(q: torch.Tensor, k: torch.Tensor, call: AttentionCall) -> VideoSequence:
    """The video and text of a call's tokens; q ``[B, S, H, D]``, k ``[B, S, Hkv, D]``.

    Raises:
        InputError: without a grid; for a grid and text that are not the tokens of q; for q and k of
            different lengths; for text inside of the video; for a mask that is not key padding.
    """
    context = call.context
    grid = context.grid if context is not None else None
    if context is None or grid is None:
        raise InputError(
            "this backend works on a video's token grid, and the call has none", hint=HINT
        )
    tokens = grid[0] * grid[1] * grid[2]
    text = context.text
    before = after = valid = 0
    if text is not None and text.length:
        valid = text.length if text.valid_length is None else text.valid_length
        if text.start == 0:
            before = text.length
        elif text.start == tokens:
            after = text.length
        else:
            raise InputError(
                f"text lies before the video's {tokens} tokens (start=0) or after them "
                f"(start={tokens}), found {text}"
            )
    length = tokens + before + after
    if q.shape[1] != length or k.shape[1] != length:
        words = f" and {before + after} text tokens" if before + after else ""
        raise InputError(
            f"the grid (T, H, W) = {grid}{words} makes {length} tokens; q has {q.shape[1]} and k "
            f"{k.shape[1]}",
            hint=HINT,
        )
    visible = None
    if call.mask is not None:
        if call.mask_kind != "key_padding":
            raise InputError(
                f"a method on a token grid takes key-padding masks only, found {call.mask_kind}"
            )
        visible = call.mask[:, 0, 0].expand(-1, length)
    return VideoSequence(grid, before, after, valid, visible)
