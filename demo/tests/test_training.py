"""The training command runs from nothing to a loadable folder, in miniature and on a CPU."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

pytest.importorskip("diffusers")

import train
from demo_training.diffusion_stage import draw_times, encode_text, shifted
from demo_training.networks import build_text_encoder, build_tokenizer, tokenize
from demo_training.runtime import MovingAverage, constant_then_linear, cosine
from demo_training.text_stage import example
from demo_training.vae_stage import VAESettings, kl_divergence, reconstruction_loss
from diffusers import WanPipeline
from folder_checks import check_configs, check_defaults, check_files, check_pipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from polyattn_demo import model_path
from polyattn_demo.clips import draw_pair, parse_prompt


@pytest.fixture(scope="module")
def shipped_text():
    """A function from a prompt to the states [tokens, width] of the shipped text encoder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path() / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(model_path() / "text_encoder")
    return lambda prompt: encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train.main(["--smoke", "--device", "cpu", "--work", str(folder)])
    return folder


def test_smoke_run_writes_a_pipeline_folder(work):
    check_files(work / "model")
    check_configs(work / "model")
    check_defaults(work / "model")
    pipeline = WanPipeline.from_pretrained(work / "model")
    check_pipeline(pipeline)
    assert any(mean != 0 for mean in pipeline.vae.config.latents_mean)


def test_smoke_run_writes_its_record(work):
    vae = json.loads((work / "record" / "vae.json").read_text())
    diffusion = json.loads((work / "record" / "diffusion.json").read_text())
    assert vae["steps"] >= 1
    assert len(vae["history"]) == vae["steps"]
    assert diffusion["steps"] >= 1
    assert diffusion["samples"] == diffusion["steps"]
    assert all(math.isfinite(x) for row in vae["history"] + diffusion["history"] for x in row)


@pytest.mark.parametrize("checkpoint", ["checkpoint.pt", "weights_half.pt"])
def test_training_can_be_taken_up_again(work, tmp_path, checkpoint):
    before = torch.load(work / checkpoint, weights_only=True)
    train.main(
        ["--smoke", "--device", "cpu", "--work", str(tmp_path), "--vae-from", str(work / "vae"),
         "--text-from", str(work / "text_encoder"), "--resume", str(work / checkpoint)]
    )  # fmt: skip
    after = torch.load(tmp_path / checkpoint, weights_only=True)
    assert after["step"] > before["step"]
    name = "proj_out.weight"  # starts at zero, so a few steps show
    assert bool(before["transformer"][name].any())
    assert not torch.equal(before["transformer"][name], after["transformer"][name])


def test_text_states_do_not_depend_on_padding():
    """Training pads prompts to 24 tokens, the pipeline to any length: the states must agree."""
    torch.manual_seed(0)
    tokenizer, encoder = build_tokenizer(), build_text_encoder().eval()
    prompts = [draw_pair(random.Random(0)).prompt, "a red circle growing", ""]
    states = encode_text(encoder, tokenize(tokenizer, prompts, torch.device("cpu")), 40)
    assert states.shape == (3, 40, 128)
    for prompt, padded in zip(prompts, states, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = encoder(ids).last_hidden_state[0]
        assert torch.allclose(padded[: len(alone)], alone, atol=1e-5)
        assert not bool(padded[len(alone) :].any())


def test_words_of_the_second_object_are_told_apart():
    """The `and` of a direction is not the one between two objects."""
    scene = parse_prompt("a red circle moving up and right and a blue star moving down and left")
    prompt, second = example(scene)
    told = dict(zip([*enumerate(prompt.split()), (None, "end")], second, strict=True))
    assert [word for (_, word), later in told.items() if later] == [
        "a", "blue", "star", "moving", "down", "and", "left",
    ]  # fmt: skip
    assert not any(example(parse_prompt("a red circle growing"))[1])
    assert example(None) == ("", [False])


def test_the_shipped_text_encoder_tells_which_object_a_word_speaks_of(shipped_text):
    """Its states differ between the two objects and are otherwise those of the word alone."""

    first = shipped_text("a red circle moving up and a blue star moving down")
    second = shipped_text("a blue star moving down and a red circle moving up")
    assert relative(first[1], second[7]) > 0.3  # red
    assert relative(first[8], second[2]) > 0.3  # star
    assert relative(first[1], shipped_text("a red square growing")[1]) < 0.1


def test_first_frame_and_objects_weigh_more():
    settings = VAESettings(first_frame_weight=5.0, object_weight=5.0)
    video, focus = torch.zeros(1, 9, 3, 4, 4), torch.zeros(1, 9, 1, 4, 4)

    def loss_of_error_in(frame, in_focus=0.0):
        output = video.clone()
        output[:, frame] = 0.1
        return float(reconstruction_loss(output, video, focus + in_focus, settings))

    assert loss_of_error_in(0) == pytest.approx(5 * loss_of_error_in(3), rel=1e-4)
    assert loss_of_error_in(3, 1.0) == pytest.approx(6 * loss_of_error_in(3), rel=1e-4)


def test_kl_is_zero_for_the_standard_normal_alone():
    zero = torch.zeros(2, 3)
    assert float(kl_divergence(zero, zero)) == 0
    assert float(kl_divergence(zero + 1, zero)) == pytest.approx(0.5)
    assert float(kl_divergence(zero, zero + 1)) == pytest.approx((math.e - 2) / 2)


def test_noise_levels():
    torch.manual_seed(0)
    t = draw_times(20000, torch.device("cpu"), shift=1.0)
    assert float(t.min()) >= 0
    assert float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(shifted(torch.tensor(0.5), 5.0)) == pytest.approx(5 / 6)


def test_schedules_and_average():
    assert cosine(0) == 1
    assert cosine(1) == pytest.approx(0.02)
    assert constant_then_linear(0.5, 0.6) == 1
    assert constant_then_linear(0.8, 0.6) == pytest.approx(0.5)
    weight = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage([weight], decay=0.9)
    with torch.no_grad():
        weight += 1
    average.update(10**6)
    assert average.average[0].tolist() == pytest.approx([0.1] * 3)
