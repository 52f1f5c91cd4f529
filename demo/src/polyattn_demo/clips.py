"""The little world the demo model knows: its words, its prompts, and a renderer for them.

A *scene* is one or two coloured shapes, each with a motion, on a dim background. `Scene.prompt`
writes it in English, `parse_prompt` reads it back, and `render` draws clips of it with every
other property (size, place, speed, background) left to chance. The model is trained on such clips
alone, and the detector is held to account on them.

Two promises matter to the detector: two objects of one scene never share a colour, and they keep
clear of each other in every frame. One matters to the model: as in a sentence read from left to
right, the object named first is the one further to the left, so that a place in the picture says
which words it belongs to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES = 33
SIZE = 128

# Neighbouring hues are at least 45 degrees apart, so a hue names a colour without doubt.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.62, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
COLOURS = tuple(PALETTE)

# Image coordinates: x grows to the right, y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and right": (1, -1),
    "up and left": (-1, -1),
    "down and right": (1, 1),
    "down and left": (-1, 1),
}
GROWING = "growing"
BOUNCING = "bouncing"
MOTIONS = (*DIRECTIONS, GROWING, BOUNCING)
PAIR_MOTIONS = tuple(DIRECTIONS)  # what the two objects of a scene do


# ---------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class StarPolygon:
    """A regular polygon with `points` corners and a dent between each two of them.

    `dent` is the radius of the dents over the radius of the corners. At cos(pi / points) the dents
    lie on the straight edges, and the star is a plain triangle, square and so on.
    """

    points: int
    dent: float
    turn: float = 0.0

    @property
    def reach(self) -> float:
        """Corner radius of the polygon that has the area of the unit circle."""
        return math.sqrt(math.pi / (self.points * self.dent * math.sin(math.pi / self.points)))

    def distance(self, x: Tensor, y_up: Tensor, radius: Tensor) -> Tensor:
        """Signed distance to the edge lines, negative inside, for the area of a circle `radius`."""
        half_sector = math.pi / self.points
        angle = torch.atan2(x, y_up) + self.turn
        # Every sector looks alike, and its two halves mirror each other: fold them all into one.
        folded = (torch.remainder(angle + half_sector, 2 * half_sector) - half_sector).abs()
        rho = torch.sqrt(x * x + y_up * y_up)
        along, across = rho * torch.cos(folded), rho * torch.sin(folded)
        # The one edge left runs from the corner (1, 0) to the dent, both times the corner radius.
        dent_along = self.dent * math.cos(half_sector)
        dent_across = self.dent * math.sin(half_sector)
        length = math.hypot(1 - dent_along, dent_across)
        normal_along, normal_across = dent_across / length, (1 - dent_along) / length
        return (along - self.reach * radius) * normal_along + across * normal_across


_POLYGONS = {
    "square": StarPolygon(4, math.cos(math.pi / 4), turn=math.pi / 4),
    "triangle": StarPolygon(3, math.cos(math.pi / 3)),
    "star": StarPolygon(5, 0.45),
}
SHAPES = ("circle", *_POLYGONS)

# How far a shape extends from its centre, over the radius of the circle with its area.
REACH = {"circle": 1.0, **{name: polygon.reach for name, polygon in _POLYGONS.items()}}
_LARGEST_REACH = max(REACH.values())


def shape_distance(shape: str, x: Tensor, y_up: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (negative inside) of points to a shape with the area of a circle `radius`.

    All shapes of one radius have one area, so that size says nothing about shape.
    """
    if shape == "circle":
        return torch.sqrt(x * x + y_up * y_up) - radius
    return _POLYGONS[shape].distance(x, y_up, radius)


# ---------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    """One object of a scene: a colour, a shape and what it does."""

    colour: str
    shape: str
    motion: str

    @property
    def phrase(self) -> str:
        verb = self.motion if self.motion in (GROWING, BOUNCING) else f"moving {self.motion}"
        return f"a {self.colour} {self.shape} {verb}"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one thing, or two of different colours."""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if len({thing.colour for thing in self.things}) < len(self.things):
            raise ValueError("the two things of a scene need different colours")

    @property
    def prompt(self) -> str:
        return " and ".join(thing.phrase for thing in self.things)


ALL_THINGS = tuple(Thing(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS)
SINGLE_SCENES = tuple(Scene((thing,)) for thing in ALL_THINGS)

_THING_BY_PHRASE = {thing.phrase: thing for thing in ALL_THINGS}


def parse_prompt(prompt: str) -> Scene:
    """The scene a prompt describes; `ValueError` for a prompt outside the model's vocabulary."""
    first, joint, second = prompt.partition(" and a ")
    phrases = [first, f"a {second}"] if joint else [prompt]
    for phrase in phrases:
        if phrase not in _THING_BY_PHRASE:
            raise ValueError(f"not a phrase of the demo model: {phrase!r}")
    return Scene(tuple(_THING_BY_PHRASE[phrase] for phrase in phrases))


def draw_pair(rng: random.Random) -> Scene:
    """A random two-object scene: two colours, any shapes, each moving in any direction."""
    colours = rng.sample(COLOURS, 2)
    return Scene(tuple(Thing(c, rng.choice(SHAPES), rng.choice(PAIR_MOTIONS)) for c in colours))


def draw_scene(
    rng: random.Random, *, pair_share: float = 0.0, bounce_share: float | None = None
) -> Scene:
    """A random scene; `pair_share` of them hold two objects.

    `bounce_share` makes single bouncing objects more frequent than one in ten.
    """
    if rng.random() < pair_share:
        return draw_pair(rng)
    if bounce_share is not None and rng.random() < bounce_share:
        return Scene((Thing(rng.choice(COLOURS), rng.choice(SHAPES), BOUNCING),))
    return rng.choice(SINGLE_SCENES)


def vocabulary() -> list[str]:
    """Every word that occurs in a prompt, sorted."""
    return sorted({word for thing in ALL_THINGS for word in thing.phrase.split()} | {"and"})


# ------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Clips:
    """Rendered clips: `video` is [B, T, 3, H, W] in [0, 1]; `focus` is [B, T, 1, H, W], close to 1
    on and just around the objects and close to 0 elsewhere (a weight for training losses)."""

    video: Tensor
    focus: Tensor


@dataclass(frozen=True)
class _Sizes:
    """Ranges (low, high) that geometry is drawn from, in pixels."""

    radius: tuple[float, float]
    growing_from: tuple[float, float]
    growth: tuple[float, float]
    travel: tuple[float, float]
    hop: tuple[float, float]


_ALONE = _Sizes((12, 18), (8, 11), (1.9, 2.2), (40, 58), (34, 48))
# Two objects must pass each other inside the frame, so they are smaller and slower.
_TOGETHER = _Sizes((11, 14), (6.5, 8), (1.7, 2.0), (34, 46), (30, 38))

_DIAGONAL_SHORTENING = 0.85  # per axis, so that a diagonal fits where a straight path does
_MARGIN = 1.0
_CLEARANCE = 5.0  # pixels kept free between two objects
_LEFT = 16.0  # pixels, on average over the clip, that the first of two objects is to the left
_PLACEMENTS = 768  # random placements tried for each pair


@dataclass(frozen=True)
class _Track:
    """One object slot over a batch of clips, before it is placed."""

    radius: Tensor  # [B, T]
    path: Tensor  # [B, T, 2], relative to the starting point
    lowest: Tensor  # [B, 2], the starting points that keep the object inside the frame
    highest: Tensor  # [B, 2]
    reach: Tensor  # [B, T], how far the shape extends from its centre


class _Dice:
    """Random numbers of one generator on one device."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def unit(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def between(self, bounds: tuple[float, float], *shape: int) -> Tensor:
        low, high = bounds
        return low + (high - low) * self.unit(*shape)


def _between(dice: _Dice, scenes: Sequence[Scene], field: str) -> Tensor:
    """One draw for each scene, from the range that suits its number of objects."""
    alone = dice.between(getattr(_ALONE, field), len(scenes))
    together = dice.between(getattr(_TOGETHER, field), len(scenes))
    crowded = torch.tensor([len(scene.things) == 2 for scene in scenes], device=dice.device)
    return torch.where(crowded, together, alone)


def _track(scenes: Sequence[Scene], things: Sequence[Thing], dice: _Dice) -> _Track:
    """Sizes and path of one object for each scene."""
    device = dice.device
    time = torch.linspace(0, 1, FRAMES, device=device)
    growing = torch.tensor([thing.motion == GROWING for thing in things], device=device)
    bouncing = torch.tensor([thing.motion == BOUNCING for thing in things], device=device)
    steps = [DIRECTIONS.get(thing.motion, (0, 0)) for thing in things]
    heading = torch.tensor(steps, device=device, dtype=torch.float32)

    steady = _between(dice, scenes, "radius")
    small = _between(dice, scenes, "growing_from")
    large = small * _between(dice, scenes, "growth")
    first = torch.where(growing, small, steady)[:, None]
    last = torch.where(growing, large, steady)[:, None]
    radius = first + (last - first) * time

    diagonal = heading.abs().sum(1, keepdim=True) == 2
    travel = _between(dice, scenes, "travel")[:, None] * heading
    travel = torch.where(diagonal, travel * _DIAGONAL_SHORTENING, travel)
    hop = torch.where(bouncing, _between(dice, scenes, "hop"), torch.zeros_like(steady))
    path = travel[:, None, :] * time[None, :, None]
    # Two hops; the object rises (y falls) and comes back to where it started.
    path[..., 1] -= hop[:, None] * torch.sin(2 * math.pi * time).abs()

    # One bound for all shapes: the place of an object says nothing about its shape.
    room = _LARGEST_REACH * radius.amax(1, keepdim=True) + _MARGIN
    lowest = room - path.amin(1)
    highest = SIZE - 1 - room - path.amax(1)
    own_reach = torch.tensor([REACH[thing.shape] for thing in things], device=device)
    return _Track(radius, path, lowest, highest, own_reach[:, None] * radius)


def _place(tracks: Sequence[_Track], dice: _Dice) -> list[Tensor]:
    """Centres [B, T, 2] of every track, the two of a pair clear of each other and in order."""
    batch = tracks[0].lowest.shape[0]
    starts = []
    for track in tracks:
        spread = (track.highest - track.lowest)[:, None]
        starts.append(track.lowest[:, None] + spread * dice.unit(batch, _PLACEMENTS, 2))
    chosen = torch.zeros(batch, dtype=torch.long, device=dice.device)
    if len(tracks) == 2:
        apart = starts[0] - starts[1]
        drift = tracks[0].path - tracks[1].path
        distance = (apart[:, :, None] + drift[:, None]).norm(dim=-1)
        gap = (distance - (tracks[0].reach + tracks[1].reach)[:, None]).amin(-1)
        left = -(apart + drift.mean(1)[:, None])[..., 0]
        # Any placement that is clear and in order will do; if none is, the one that comes closest
        # to it, where a pixel of clearance counts for more than all the order there is.
        chosen = (gap.clamp(max=_CLEARANCE) + left.clamp(-SIZE, _LEFT) / SIZE).argmax(1)
    rows = torch.arange(batch, device=dice.device)
    return [
        start[rows, chosen][:, None] + track.path
        for start, track in zip(starts, tracks, strict=True)
    ]


def _distances(things: Sequence[Thing], centre: Tensor, radius: Tensor) -> Tensor:
    """Signed distance [B, T, H, W] of every pixel to the object of each clip."""
    grid = torch.arange(SIZE, device=centre.device, dtype=torch.float32)
    out = torch.empty(*radius.shape, SIZE, SIZE, device=centre.device)
    for shape in SHAPES:
        rows = [i for i, thing in enumerate(things) if thing.shape == shape]
        if not rows:
            continue
        index = torch.tensor(rows, device=centre.device)
        x = grid - centre[index, :, 0, None]
        y_up = centre[index, :, 1, None, None] - grid[:, None]
        out[index] = shape_distance(shape, x[..., None, :], y_up, radius[index, :, None, None])
    return out


def _backgrounds(batch: int, dice: _Dice) -> Tensor:
    """[B, 1, 3, H, W]: a dim level, a soft slope in any direction, and the slightest tint.

    The tint stays far below the chroma at which the detector sees an object.
    """
    level = dice.between((0.06, 0.32), batch, 1, 1, 1, 1)
    tint = dice.between((-0.02, 0.02), batch, 1, 3, 1, 1)
    angle = dice.between((0.0, 2 * math.pi), batch, 1, 1, 1, 1)
    rise = dice.between((0.0, 0.06), batch, 1, 1, 1, 1)
    line = torch.linspace(-1, 1, SIZE, device=dice.device)
    slope = torch.cos(angle) * line + torch.sin(angle) * line[:, None]
    return (level + tint + rise * slope).clamp(0, 1)


def render(
    scenes: Sequence[Scene],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Clips:
    """Draw one clip for each scene. `generator` must live on `device`."""
    dice = _Dice(generator, torch.device(device))
    slots = max(len(scene.things) for scene in scenes)
    # A scene with one object gets a double in the second slot, which is then not painted.
    things = [[scene.things[k % len(scene.things)] for scene in scenes] for k in range(slots)]
    tracks = [_track(scenes, row, dice) for row in things]
    centres = _place(tracks, dice)
    video = _backgrounds(len(scenes), dice).expand(-1, FRAMES, -1, -1, -1)
    focus = torch.zeros(len(scenes), FRAMES, 1, SIZE, SIZE, device=dice.device)
    for slot, row in enumerate(things):
        present = torch.tensor([slot < len(s.things) for s in scenes], device=dice.device)
        distance = _distances(row, centres[slot], tracks[slot].radius)
        distance = torch.where(present[:, None, None, None], distance, torch.inf)[:, :, None]
        base = torch.tensor([PALETTE[thing.colour] for thing in row], device=dice.device)
        paint = (base + dice.between((-0.03, 0.03), len(scenes), 3)).clamp(0, 1)
        # One pixel of anti-aliasing: the share of the pixel that the object covers.
        covered = (0.5 - distance).clamp(0, 1)
        video = video + covered * (paint[:, None, :, None, None] - video)
        focus = torch.maximum(focus, torch.sigmoid(3 - distance))
    return Clips(video, focus)
