"""The renderer draws what the prompts say, and keeps the promises the detector relies on."""

from __future__ import annotations

import math
import random

import pytest
import torch

from polyattn_demo.clips import (
    ALL_THINGS,
    BOUNCING,
    COLOURS,
    FRAMES,
    GROWING,
    MOTIONS,
    PALETTE,
    SHAPES,
    SINGLE_SCENES,
    SIZE,
    Scene,
    Thing,
    draw_pair,
    draw_scene,
    parse_prompt,
    render,
    shape_distance,
    vocabulary,
)


def test_prompts():
    assert len(SINGLE_SCENES) == 6 * 4 * 10 == len({s.prompt for s in SINGLE_SCENES})
    assert Scene((Thing("red", "circle", "right"),)).prompt == "a red circle moving right"
    two = Scene((Thing("red", "circle", "up and left"), Thing("blue", "star", GROWING)))
    assert two.prompt == "a red circle moving up and left and a blue star growing"


def test_prompts_are_read_back():
    rng = random.Random(0)
    for scene in [*SINGLE_SCENES, *(draw_pair(rng) for _ in range(300))]:
        assert parse_prompt(scene.prompt) == scene
    for foreign in ("a red dog moving right", "", "a red circle", "a red circle growing and a"):
        with pytest.raises(ValueError):
            parse_prompt(foreign)


def test_scenes_refuse_what_the_detector_cannot_tell_apart():
    thing = ALL_THINGS[0]
    with pytest.raises(ValueError, match="colours"):
        Scene((thing, Thing(thing.colour, "star", BOUNCING)))
    with pytest.raises(ValueError, match="one or two"):
        Scene(())


def test_vocabulary_is_every_word():
    rng = random.Random(1)
    prompts = [draw_scene(rng, pair_share=0.5).prompt for _ in range(2000)]
    assert {word for prompt in prompts for word in prompt.split()} == set(vocabulary())


def test_bounce_share():
    rng = random.Random(2)
    scenes = [draw_scene(rng, bounce_share=0.5) for _ in range(1000)]
    share = sum(scene.things[0].motion == BOUNCING for scene in scenes) / 1000
    assert 0.48 < share < 0.62  # 0.5 + 0.5 / 10


def test_hues_are_far_apart():
    import colorsys

    hues = sorted(360 * colorsys.rgb_to_hsv(*PALETTE[colour])[0] for colour in COLOURS)
    gaps = [b - a for a, b in zip(hues, [*hues[1:], hues[0] + 360], strict=True)]
    assert min(gaps) >= 45


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_equal_area_and_stand_on_their_centre(shape):
    line = torch.arange(-4, 4, 0.01) + 0.005
    y, x = torch.meshgrid(line, line, indexing="ij")
    inside = shape_distance(shape, x, y, torch.tensor(2.0)) < 0
    area = float(inside.sum()) * 0.01**2
    assert area == pytest.approx(math.pi * 4, rel=0.01)
    assert float(x[inside].mean()) == pytest.approx(0, abs=0.01)
    assert float(y[inside].mean()) == pytest.approx(0, abs=0.01)


def test_triangle_and_star_point_up():
    radius = torch.tensor(2.0)
    for shape in ("triangle", "star"):
        above = shape_distance(shape, torch.tensor(0.0), torch.tensor(2.5), radius)
        below = shape_distance(shape, torch.tensor(0.0), torch.tensor(-2.5), radius)
        assert float(above) < 0 < float(below)


def test_render_is_repeatable_and_bounded():
    scenes = [SINGLE_SCENES[5], draw_pair(random.Random(0))]
    first = render(scenes, torch.Generator().manual_seed(4))
    second = render(scenes, torch.Generator().manual_seed(4))
    other = render(scenes, torch.Generator().manual_seed(5))
    assert first.video.shape == (2, FRAMES, 3, SIZE, SIZE)
    assert first.focus.shape == (2, FRAMES, 1, SIZE, SIZE)
    assert torch.equal(first.video, second.video)
    assert not torch.equal(first.video, other.video)
    assert float(first.video.min()) >= 0
    assert float(first.video.max()) <= 1


def test_single_scenes_have_an_empty_second_slot():
    """A scene rendered beside a pair shows one object, not two."""
    generator = torch.Generator().manual_seed(0)
    clips = render([SINGLE_SCENES[0], draw_pair(random.Random(0))], generator)
    chroma = clips.video.amax(2) - clips.video.amin(2)
    assert bool((chroma[0] > 0.33).any(-1).any(-1).all())
    single, double = (chroma > 0.33).float().mean((1, 2, 3)).tolist()
    assert single < math.pi * 18**2 / SIZE**2 * 1.1
    assert double > 0


def test_backgrounds_vary_but_stay_without_colour():
    """Levels, slopes and tints differ, far below the chroma that counts as an object."""
    scenes = [SINGLE_SCENES[i] for i in range(40)]
    clips = render(scenes, torch.Generator().manual_seed(1))
    plain = clips.focus[:, 0] < 1e-3
    chroma = clips.video[:, 0].amax(1, keepdim=True) - clips.video[:, 0].amin(1, keepdim=True)
    assert float(chroma[plain].max()) < 0.1
    grey = clips.video[:, 0].mean(1)
    seen = [frame[mask] for frame, mask in zip(grey, plain[:, 0], strict=True)]
    levels = torch.stack([pixels.mean() for pixels in seen])
    slopes = torch.stack([pixels.std() for pixels in seen])
    assert float(levels.std()) > 0.04
    assert float(slopes.max()) > 0.02
    assert float(slopes.min()) < 0.01


def test_every_motion_moves_as_named():
    scenes = [Scene((Thing("green", "circle", motion),)) for motion in MOTIONS]
    clips = render(scenes, torch.Generator().manual_seed(2))
    for motion, video in zip(MOTIONS, clips.video, strict=True):
        mask = (video.amax(1) - video.amin(1) > 0.33).float()
        grid = torch.arange(SIZE).float()
        area = mask.sum((1, 2))
        x = (mask.sum(1) * grid).sum(1) / area
        y = (mask.sum(2) * grid).sum(1) / area
        dx, dy = float(x[-1] - x[0]), float(y[-1] - y[0])
        words = motion.split()
        assert (dx > 25) == ("right" in words)
        assert (dx < -25) == ("left" in words)
        assert (dy > 25) == ("down" in words)
        assert (dy < -25) == ("up" in words)
        assert (float(area[-1] / area[0]) > 2) == (motion == GROWING)
        if motion == BOUNCING:
            assert float(y[0] - y.min()) > 30
            assert abs(dy) < 3
