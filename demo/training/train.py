"""Train the demo model from nothing and write its folder: one command.

    python demo/training/train.py --work work-folder

Stage two runs on several GPUs of one machine too, once there is an autoencoder:

    torchrun --nproc-per-node 2 demo/training/train.py --work work-folder --vae-from work-folder/vae

Files in the work folder: `vae/`, `model/` (the pipeline folder), `checkpoint.pt` to go on from (and
`weights_half.pt`, a small one without the optimizer), `record/` (what was done, as JSON). Model and
checkpoints are renewed every minute and a half, so that an interrupted run can be taken up again
with `--vae-from` and `--resume`. `--smoke` runs every step in miniature on a CPU.

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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

from demo_training.diffusion_stage import DiffusionSettings, DiffusionTrainer, train_diffusion  # noqa: E402
from demo_training.parallel_vae import NormSilu, rms_norm_silu  # noqa: E402
from demo_training.runtime import Team, log, machine, prepare  # noqa: E402
from demo_training.saving import save_pipeline  # noqa: E402
from demo_training.vae_stage import VAESettings, train_vae  # noqa: E402

SMOKE_VAE = VAESettings(
    seconds=1, batch=1, base_dim=8, render_batch=1, warmup_steps=1, short_share=1.0, short_frames=9,
    statistics_batches=1, check_clips=1, log_every=1,
)  # fmt: skip
SMOKE_DIFFUSION = DiffusionSettings(
    seconds=1, batch=1, num_layers=1, warmup_steps=1, bank=2, encode_batch=1,
    preview_at=(), preview_scenes=2, preview_steps=1, log_every=1,
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-seconds", type=float, help="time for the autoencoder")
    parser.add_argument("--diffusion-seconds", type=float, help="time for transformer and text")
    parser.add_argument("--learning-rate", type=float, help="of stage two, to go on more gently")
    parser.add_argument(
        "--decay-from", type=float, help="share of stage two after which the learning rate falls"
    )
    parser.add_argument("--pair-share", type=float, help="share of clips with two objects")
    parser.add_argument("--vae-from", type=Path, help="skip stage one; a trained autoencoder")
    parser.add_argument(
        "--resume", type=Path, help="go on with stage two: a checkpoint or a model folder"
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
    networks = {"transformer": trainer.transformer, "text_encoder": trainer.text_encoder}
    half = {
        name: {key: value.half() for key, value in network.state_dict().items()}
        for name, network in networks.items()
    }
    torch.save({"step": trainer.step, **half}, path)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    vae_settings, diffusion_settings = settings_from(options)
    work, team = options.work, Team(options.device)
    device = team.device
    if team.size > 1 and options.vae_from is None:
        raise SystemExit("stage one runs in one process: train it first, then give --vae-from")
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

    trainer = DiffusionTrainer(diffusion_settings, vae, team, norm_silu)
    if options.resume is not None:
        trainer.load(options.resume)
    if device.type == "cuda":
        trainer.compile()

    def save_all(trainer: DiffusionTrainer) -> None:
        transformer, text_encoder = trainer.averaged()
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
