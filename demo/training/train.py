r"""Train the demo model from nothing and write its folder: one command.

    python demo/training/train.py --work work-folder

Three stages: the autoencoder, the text encoder, and the transformer. The last can have several GPUs
of one machine, once there are the other two:

    torchrun --nproc-per-node 2 demo/training/train.py --work work-folder \
        --vae-from work-folder/vae --text-from work-folder/text_encoder

Files in the work folder: `vae/`, `text_encoder/`, `model/` (the pipeline folder), `checkpoint.pt`
to go on from (and `weights_half.pt`, a small one without the optimizer), `record/` (what was done,
as JSON). Model and checkpoints are renewed every minute and a half, so that a broken run can be
taken up again with `--vae-from`, `--text-from` and `--resume`. `--smoke` runs every step in
miniature on a CPU.

To ship a model, copy `model/` to `src/polyattn_demo/model` and `record/` to `training/record`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

from demo_training.diffusion_stage import DiffusionSettings, DiffusionTrainer, train_diffusion  # noqa: E402
from demo_training.parallel_vae import NormSilu, rms_norm_silu  # noqa: E402
from demo_training.runtime import Team, log, machine, prepare  # noqa: E402
from demo_training.saving import save_pipeline  # noqa: E402
from demo_training.text_stage import TextSettings, train_text  # noqa: E402
from demo_training.vae_stage import VAESettings, train_vae  # noqa: E402

SMOKE_VAE = VAESettings(
    seconds=1, batch=1, base_dim=8, render_batch=1, warmup_steps=1, short_share=1.0, short_frames=9,
    statistics_batches=1, check_clips=1, log_every=1,
)  # fmt: skip
SMOKE_TEXT = TextSettings(steps=2, batch=4)
SMOKE_DIFFUSION = DiffusionSettings(
    seconds=1, batch=1, num_layers=1, warmup_steps=1, bank=2, encode_batch=1,
    preview_at=(), preview_scenes=2, preview_steps=1, log_every=1,
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-seconds", type=float, help="time for the autoencoder")
    parser.add_argument("--diffusion-seconds", type=float, help="time for the transformer")
    parser.add_argument("--learning-rate", type=float, help="of the transformer")
    parser.add_argument(
        "--decay-from", type=float, help="share of the time after which the learning rate falls"
    )
    parser.add_argument("--pair-share", type=float, help="share of clips with two objects")
    parser.add_argument("--vae-from", type=Path, help="a trained autoencoder, to skip its stage")
    parser.add_argument("--text-from", type=Path, help="a trained text encoder, to skip its stage")
    parser.add_argument(
        "--words-from", type=Path, help="train the text encoder to the word states of this one"
    )
    parser.add_argument(
        "--resume", type=Path, help="go on with the transformer: a checkpoint or a model folder"
    )
    parser.add_argument("--smoke", action="store_true", help="every step in miniature")
    return parser.parse_args(arguments)


def settings_from(options: argparse.Namespace) -> tuple[VAESettings, DiffusionSettings]:
    vae = SMOKE_VAE if options.smoke else VAESettings()
    diffusion = SMOKE_DIFFUSION if options.smoke else DiffusionSettings()
    if options.vae_seconds is not None:
        vae = replace(vae, seconds=options.vae_seconds)
    if options.diffusion_seconds is not None:
        diffusion = replace(diffusion, seconds=options.diffusion_seconds)
    for name in ("learning_rate", "decay_from", "pair_share"):
        if (value := getattr(options, name)) is not None:
            diffusion = replace(diffusion, **{name: value})
    return vae, diffusion


def fastest_norm(device: torch.device) -> NormSilu:
    if device.type != "cuda":
        return rms_norm_silu
    from demo_training.fused_norm import checked_norm_silu

    return checked_norm_silu(device)


def write_record(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def save_half_weights(trainer: DiffusionTrainer, path: Path) -> None:
    """A small checkpoint to go on from: the weights as they are, without the optimizer."""
    half = {key: value.half() for key, value in trainer.transformer.state_dict().items()}
    torch.save({"step": trainer.step, "transformer": half}, path)


def text_encoder_of(options: argparse.Namespace, team: Team) -> UMT5EncoderModel:
    """Trained, or loaded from where the command says."""
    if options.text_from is not None:
        encoder = UMT5EncoderModel.from_pretrained(options.text_from, dtype=torch.float32)
        return encoder.eval().requires_grad_(False)
    known = options.words_from and UMT5EncoderModel.from_pretrained(
        options.words_from, dtype=torch.float32
    )
    settings = SMOKE_TEXT if options.smoke else TextSettings()
    encoder, record = train_text(settings, team.device, known)
    encoder.save_pretrained(options.work / "text_encoder")
    write_record(
        options.work / "record" / "text.json",
        {**machine(team.device), "word_states": "kept" if known else "random", **record},
    )
    return encoder


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    vae_settings, diffusion_settings = settings_from(options)
    work, team = options.work, Team(options.device)
    device = team.device
    if team.size > 1 and None in (options.vae_from, options.text_from):
        raise SystemExit("only the transformer has several processes: give --vae-from, --text-from")
    work.mkdir(parents=True, exist_ok=True)
    prepare(device)
    norm_silu = fastest_norm(device)
    log(machine(device))

    if options.vae_from is None:
        vae, vae_record = train_vae(vae_settings, device, norm_silu)
        vae.save_pretrained(work / "vae")
        write_record(work / "record" / "vae.json", {**machine(device), **asdict(vae_record)})
    else:
        vae = AutoencoderKLWan.from_pretrained(options.vae_from).to(device)
        vae.eval().requires_grad_(False)

    text_encoder = text_encoder_of(options, team)
    trainer = DiffusionTrainer(diffusion_settings, vae, text_encoder, team, norm_silu)
    if options.resume is not None:
        trainer.load(options.resume)
    if device.type == "cuda":
        trainer.compile()

    def save_all(trainer: DiffusionTrainer) -> None:
        transformer = trainer.averaged()
        save_pipeline(work / "model", vae, transformer, text_encoder, trainer.tokenizer)
        trainer.save(work / "checkpoint.pt")
        save_half_weights(trainer, work / "weights_half.pt")

    record = train_diffusion(trainer, save_all)
    if team.leads:
        write_record(work / "record" / "diffusion.json", {**machine(device), **asdict(record)})
        log("saved", work / "model")
    team.close()


if __name__ == "__main__":
    main()
