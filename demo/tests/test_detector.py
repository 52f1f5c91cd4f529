"""The detector is right on rendered clips, wrong on wrong prompts, and strict on flawed videos."""

from __future__ import annotations

import random

import pytest
import torch

from polyattn_demo.clips import SINGLE_SCENES, SIZE, Scene, Thing, draw_pair, render
from polyattn_demo.detector import detect, judge

CLIPS = 200


def rendered(scenes, seed):
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(scenes), 8):
        yield from render(scenes[start : start + 8], generator).video


@pytest.fixture(scope="module")
def singles():
    order = list(SINGLE_SCENES)
    random.Random(7).shuffle(order)
    scenes = order[:CLIPS]
    return scenes, [detect(video) for video in rendered(scenes, seed=7)]


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(8)
    scenes = [draw_pair(rng) for _ in range(CLIPS)]
    return scenes, [detect(video) for video in rendered(scenes, seed=8)]


def share_right(found, scenes):
    verdicts = [judge(seen, scene) for seen, scene in zip(found, scenes, strict=True)]
    return sum(verdict.all_right for verdict in verdicts) / len(verdicts)


def test_gate_on_single_objects(singles):
    scenes, found = singles
    assert share_right(found, scenes) >= 0.99


def test_gate_on_two_objects(pairs):
    scenes, found = pairs
    assert share_right(found, scenes) >= 0.97


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_shifted_prompts_fail(singles, pairs, shift):
    for scenes, found in (singles, pairs):
        shifted = scenes[shift:] + scenes[:shift]
        assert share_right(found, shifted) < 0.10


def test_each_count_can_be_wrong_alone(singles):
    scenes, found = singles
    thing, seen = scenes[0].things[0], found[0]
    assert judge(seen, scenes[0]).all_right
    for field, other in (("colour", "red"), ("shape", "star"), ("motion", "growing")):
        if getattr(thing, field) == other:
            other = {"colour": "green", "shape": "circle", "motion": "up"}[field]
        values = {"colour": thing.colour, "shape": thing.shape, "motion": thing.motion}
        verdict = judge(seen, Scene((Thing(**{**values, field: other}),)))
        wrong = [name for name in values if not getattr(verdict, name)]
        assert wrong == [field]


def test_order_of_two_things_does_not_matter(pairs):
    scenes, found = pairs
    swapped = [Scene(scene.things[::-1]) for scene in scenes[:20]]
    assert share_right(found[:20], swapped) == share_right(found[:20], scenes[:20])


def test_properties_swapped_between_two_things_are_seen(pairs):
    scenes, found = pairs
    checked = 0
    for scene, seen in zip(scenes, found, strict=True):
        one, two = scene.things
        if one.shape == two.shape or one.motion == two.motion or not judge(seen, scene).all_right:
            continue
        wrong_shapes = Scene((Thing(one.colour, two.shape, one.motion),
                              Thing(two.colour, one.shape, two.motion)))  # fmt: skip
        assert not judge(seen, wrong_shapes).all_right
        checked += 1
    assert checked > 50


def test_number_of_objects_must_match(singles, pairs):
    single, pair = singles[1][0], pairs[1][0]
    assert not judge(single, pairs[0][0]).colour
    assert not judge(pair, singles[0][0]).colour


# ------------------------------------------------------------------------------- flawed videos

RED_RIGHT = Scene((Thing("red", "circle", "right"),))


@pytest.fixture
def video():
    clip = render([RED_RIGHT], torch.Generator().manual_seed(11)).video[0]
    assert judge(detect(clip), RED_RIGHT).all_right
    return clip


def fails_on_all_counts(video):
    verdict = judge(detect(video), RED_RIGHT)
    return not (verdict.colour or verdict.shape or verdict.motion)


def place_far_from_object(frame):
    """Corner with no object near it: its row and column."""
    chroma = frame.amax(0) - frame.amin(0)
    corners = [(6, 6), (6, SIZE - 30), (SIZE - 30, 6), (SIZE - 30, SIZE - 30)]
    return min(corners, key=lambda c: float(chroma[c[0] : c[0] + 24, c[1] : c[1] + 24].max()))


@pytest.mark.parametrize(
    "paint", [(0.9, 0.1, 0.1), (0.1, 0.2, 0.9), (0.45, 0.18, 0.18)], ids=["copy", "other", "ghost"]
)
def test_stray_objects_fail(video, paint):
    for frame in video[::2]:  # in every other frame, so it is not taken for an object of its own
        row, column = place_far_from_object(frame)
        frame[:, row : row + 20, column : column + 20] = torch.tensor(paint)[:, None, None]
    assert fails_on_all_counts(video)


def test_a_second_object_throughout_fails(video):
    row, column = place_far_from_object(video.amax(0))
    video[:, :, row : row + 16, column : column + 16] = torch.tensor((0.1, 0.2, 0.9))[:, None, None]
    assert fails_on_all_counts(video)


def test_missing_frames_fail(video):
    one = video.clone()
    one[5] = 0.2
    assert judge(detect(one), RED_RIGHT).all_right  # a single one is forgiven
    two = one.clone()
    two[20] = 0.2
    assert fails_on_all_counts(two)
    assert fails_on_all_counts(video[:-1])


def test_empty_and_broken_videos_fail(video):
    assert fails_on_all_counts(torch.full_like(video, 0.2))
    assert fails_on_all_counts(torch.rand(video.shape, generator=torch.Generator().manual_seed(0)))
    video[3, 0, 0, 0] = float("nan")
    assert fails_on_all_counts(video)
    with pytest.raises(ValueError, match="expected a video"):
        detect(torch.zeros(3, 33, SIZE, SIZE).mean(0))


def test_shuffled_frames_are_no_motion(video):
    order = torch.randperm(len(video), generator=torch.Generator().manual_seed(0))
    assert not judge(detect(video[order]), RED_RIGHT).motion


def test_played_backwards_is_the_other_direction(video):
    found = detect(video.flip(0))
    assert judge(found, Scene((Thing("red", "circle", "left"),))).all_right


def test_a_blob_has_no_clear_shape(video):
    """A long bar is none of the four shapes."""
    bar = torch.full_like(video, 0.2)
    for i, frame in enumerate(bar):
        frame[:, 10 + 2 * i : 16 + 2 * i, 20:100] = torch.tensor((0.9, 0.1, 0.1))[:, None, None]
    assert detect(bar).things[0].shape == "unclear" if detect(bar).things else True
    assert not judge(detect(bar), Scene((Thing("red", "square", "down"),))).shape
