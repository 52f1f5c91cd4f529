"""Contact sheets: a few frames of each video in a strip, under the prompt it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from polyattn_demo.clips import FRAMES

SHEET_FRAMES = (0, 8, 16, 24, FRAMES - 1)
_LABEL_HEIGHT = 16
_GAP = 6
_PAPER, _INK = (24, 24, 24), (235, 235, 235)


def contact_sheet(
    videos: Sequence[Tensor],
    labels: Sequence[str],
    path: Path,
    *,
    columns: int = 3,
    frame_size: int = 80,
) -> None:
    """Write a PNG of `videos`, each [T, 3, H, W] in [0, 1]. Needs Pillow."""
    from PIL import Image, ImageDraw

    rows = -(-len(videos) // columns)
    strip_width = len(SHEET_FRAMES) * frame_size
    strip_height = frame_size + _LABEL_HEIGHT
    size = (columns * (strip_width + _GAP) + _GAP, rows * (strip_height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (video, label) in enumerate(zip(videos, labels, strict=True)):
        left = _GAP + (i % columns) * (strip_width + _GAP)
        top = _GAP + (i // columns) * (strip_height + _GAP)
        pen.text((left, top), label, fill=_INK)
        for j, frame in enumerate(SHEET_FRAMES):
            pixels = (video[frame].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            image = Image.fromarray(pixels).resize((frame_size, frame_size))
            sheet.paste(image, (left + j * frame_size, top + _LABEL_HEIGHT))
    sheet.save(path, optimize=True)
