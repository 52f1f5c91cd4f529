"""What is to be seen in a video, read off its pixels without knowing the prompt.

`detect` finds coloured objects on a dim background and says of each its colour, shape and motion.
`judge` compares that with a scene. The rules are strict: a video with something in it that belongs
to no object (a ghost, a second copy, a smear), with an object missing from more than one frame, or
with the wrong number of objects or frames, is *not clean* and fails on every count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyattn_demo.clips import (
    BOUNCING,
    COLOURS,
    DIRECTIONS,
    FRAMES,
    GROWING,
    PALETTE,
    SHAPES,
    Scene,
    Thing,
    shape_distance,
)

# Chroma is the largest minus the smallest of R, G, B. Paint has .6 to .88, backgrounds up to .04;
# the first threshold is where a pixel is about half covered, the second sees faint ghosts as well.
SOLID_CHROMA = 0.33
FAINT_CHROMA = 0.22

MIN_AREA = 60.0  # pixels, the median over the frames from which a colour counts as an object
MIN_FRAME_AREA = 40.0  # pixels, in a single frame
MAX_STRAY = 0.15  # of the area of all objects, in a single frame
MISSING_FRAMES = 1  # frames of a video that may break the two rules above
HALO = 5  # pixels around an object whose soft edge is not a ghost
SPREAD = 1.9  # pixels further than this from the middle, in radii, do not belong to an object

MIN_TRAVEL = 20.0  # pixels from first to last frame, along the straight line that fits best
MAX_WOBBLE = 5.0  # pixels, root mean square distance from that line
MIN_GROWTH = 1.6  # ratio of areas, last frames over first
MIN_HOP, MAX_SIDEWAYS = 20.0, 15.0  # pixels, for bouncing
MIN_OVERLAP = 0.7  # intersection over union with the template of the shape
SHAPE_STRIDE = 4  # shapes are compared on every fourth frame

UNCLEAR = "unclear"


@dataclass(frozen=True)
class Detection:
    """What was found: things (shape or motion may be "unclear") and whether the video is clean."""

    things: tuple[Thing, ...]
    clean: bool
    frames: int
    bad_frames: int
    stray: float  # mean over the frames, of the area of all objects
    overlap: float  # mean over the objects, with the template of the shape found

    @property
    def summary(self) -> str:
        seen = " and ".join(thing.phrase for thing in self.things) or "nothing"
        flaw = "" if self.clean else f" (not clean: {self.bad_frames} bad frames)"
        return f"{seen}{flaw}, stray {self.stray:.2f}, overlap {self.overlap:.2f}"


@dataclass(frozen=True)
class Verdict:
    """Which counts a video gets right. Nothing is right in a video that is not clean."""

    colour: bool
    shape: bool
    motion: bool

    @property
    def all_right(self) -> bool:
        return self.colour and self.shape and self.motion


def _hue(rgb: Tensor) -> Tensor:
    """Hue in degrees; `rgb` has its channels last."""
    red, green, blue = rgb.unbind(-1)
    largest, smallest = rgb.amax(-1), rgb.amin(-1)
    span = (largest - smallest).clamp(min=1e-6)
    hue = torch.where(
        largest == red,
        torch.remainder((green - blue) / span, 6),
        torch.where(largest == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    return hue * 60


def _colour_masks(video: Tensor) -> tuple[Tensor, Tensor]:
    """Solid pixels by nearest palette colour [6, T, H, W], and all faintly coloured ones."""
    chroma = video.amax(1) - video.amin(1)
    smooth = F.avg_pool2d(video, 3, stride=1, padding=1, count_include_pad=False)
    palette = _hue(torch.tensor(list(PALETTE.values()), device=video.device))
    hue = _hue(smooth.permute(0, 2, 3, 1))
    apart = torch.remainder(hue[None] - palette[:, None, None, None] + 180, 360) - 180
    nearest = apart.abs().argmin(0)
    names = torch.arange(len(COLOURS), device=video.device)[:, None, None, None]
    return (nearest[None] == names) & (chroma > SOLID_CHROMA), chroma > FAINT_CHROMA


def _middle(counts: Tensor) -> Tensor:
    """Median position along the last dimension of a histogram of pixels."""
    running = counts.cumsum(-1)
    return (running < running[..., -1:] / 2).sum(-1).float()


def _keep_near(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The pixels of each frame's mask that lie within reach of its median point."""
    count = mask.float()
    middle_x, middle_y = _middle(count.sum(-2)), _middle(count.sum(-1))
    radius = (count.sum((-2, -1)) / math.pi).sqrt()
    far = (x - middle_x[:, None, None]) ** 2 + (y - middle_y[:, None, None]) ** 2
    return mask & (far <= ((SPREAD * radius + 1) ** 2)[:, None, None])


@dataclass(frozen=True)
class _Object:
    """One colour's pixels over the frames, and what follows from them."""

    mask: Tensor  # [T, H, W]
    area: Tensor  # [T]
    centre: Tensor  # [T, 2]


def _measure(mask: Tensor, x: Tensor, y: Tensor) -> _Object:
    mask = _keep_near(mask, x, y)
    area = mask.float().sum((-2, -1))
    divisor = area.clamp(min=1)
    centre_x = (mask * x).sum((-2, -1)) / divisor
    centre_y = (mask * y).sum((-2, -1)) / divisor
    return _Object(mask, area, torch.stack([centre_x, centre_y], -1))


def _shape(thing: _Object, frames: Tensor, x: Tensor, y: Tensor) -> tuple[str, float]:
    """The shape whose equal-area template fits best, and how well, averaged over `frames`."""
    mask, centre = thing.mask[frames], thing.centre[frames]
    radius = (thing.area[frames] / math.pi).sqrt()[:, None, None]
    dx = x - centre[:, 0, None, None]
    dy_up = centre[:, 1, None, None] - y
    overlaps = []
    for shape in SHAPES:
        template = shape_distance(shape, dx, dy_up, radius) < 0
        shared = (template & mask).sum((-2, -1)).float()
        either = (template | mask).sum((-2, -1)).clamp(min=1)
        overlaps.append(float((shared / either).mean()))
    best = max(overlaps)
    return (SHAPES[overlaps.index(best)] if best >= MIN_OVERLAP else UNCLEAR), best


def _motion(thing: _Object, frames: Tensor) -> str:
    """What the object does over the frames in which it is seen well."""
    centre = thing.centre[frames].double().cpu()
    area = thing.area[frames].double().cpu()
    time = frames.double().cpu()
    time = (time - time.mean())[:, None]
    offset = centre - centre.mean(0)
    speed = (time * offset).sum(0) / (time**2).sum()
    travel = speed * (len(thing.area) - 1)
    wobble = float(((offset - time * speed) ** 2).sum(1).mean().sqrt())
    spread = centre.amax(0) - centre.amin(0)
    if float(travel.norm()) >= MIN_TRAVEL:
        return _direction(float(travel[0]), float(travel[1])) if wobble <= MAX_WOBBLE else UNCLEAR
    if float(area[-4:].mean() / area[:4].mean()) >= MIN_GROWTH:
        return GROWING
    if float(spread[1]) >= MIN_HOP and float(spread[0]) <= MAX_SIDEWAYS:
        return BOUNCING
    return UNCLEAR


def _direction(dx: float, dy: float) -> str:
    """The nearest of the eight directions."""

    def alignment(name: str) -> float:
        x, y = DIRECTIONS[name]
        return (dx * x + dy * y) / math.hypot(x, y)

    return max(DIRECTIONS, key=alignment)


def _stray(objects: Sequence[_Object], solid: Tensor, faint: Tensor) -> Tensor:
    """Coloured area outside every object, per frame, over the area of all objects."""
    own = torch.stack([thing.mask for thing in objects]).any(0)
    grown = F.max_pool2d(own.float()[:, None], 2 * HALO + 1, stride=1, padding=HALO)[:, 0] > 0
    outside = (solid & ~own) | (faint & ~grown)
    return outside.float().sum((-2, -1)) / own.float().sum((-2, -1)).clamp(min=1)


def detect(video: Tensor) -> Detection:
    """Find the objects of a video [T, 3, H, W] with values in [0, 1]."""
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"expected a video [T, 3, H, W], got {tuple(video.shape)}")
    video = video.float()
    frames = video.shape[0]
    nothing = Detection((), False, frames, frames, 0.0, 0.0)
    if not bool(torch.isfinite(video).all()):
        return nothing
    masks, faint = _colour_masks(video)
    present = masks.float().sum((-2, -1)).median(1).values >= MIN_AREA
    if not bool(present.any()):
        return nothing
    x = torch.arange(video.shape[3], device=video.device, dtype=torch.float32)[None, None, :]
    y = torch.arange(video.shape[2], device=video.device, dtype=torch.float32)[None, :, None]
    found = {name: _measure(masks[i], x, y) for i, name in enumerate(COLOURS) if bool(present[i])}
    objects = list(found.values())

    stray = _stray(objects, masks.any(0), faint)
    seen = torch.stack([thing.area >= MIN_FRAME_AREA for thing in objects]).all(0)
    good = seen & (stray <= MAX_STRAY)
    bad_frames = frames - int(good.sum())
    usable = seen.nonzero()[:, 0]
    if len(usable) < 8:
        return nothing

    things, overlaps = [], []
    for colour, thing in found.items():
        shape, overlap = _shape(thing, usable[::SHAPE_STRIDE], x, y)
        things.append(Thing(colour, shape, _motion(thing, usable)))
        overlaps.append(overlap)
    return Detection(
        things=tuple(things),
        clean=bad_frames <= MISSING_FRAMES,
        frames=frames,
        bad_frames=bad_frames,
        stray=float(stray.mean()),
        overlap=sum(overlaps) / len(overlaps),
    )


def judge(found: Detection, wanted: Scene, frames: int = FRAMES) -> Verdict:
    """Compare a detection with the scene that was asked for.

    The order of two things does not matter; of the two ways to pair them, the better one counts.
    """
    if not found.clean or found.frames != frames or len(found.things) != len(wanted.things):
        return Verdict(False, False, False)
    verdicts = []
    for order in permutations(found.things):
        pairs = list(zip(order, wanted.things, strict=True))
        verdicts.append(
            Verdict(
                colour=all(seen.colour == want.colour for seen, want in pairs),
                shape=all(seen.shape == want.shape for seen, want in pairs),
                motion=all(seen.motion == want.motion for seen, want in pairs),
            )
        )
    return max(verdicts, key=lambda v: (v.all_right, v.colour + v.shape + v.motion))
