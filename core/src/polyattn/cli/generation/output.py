"""Writing a video so that it is there whole or not at all.

Frames are encoded into a hidden file beside the final one, counted, and moved into place in one
step; whatever goes wrong, interruption included, the hidden file is removed and an existing video
is untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polyattn.errors import GenerateError

__all__ = ["SUFFIXES", "check_destination", "check_space", "write_text", "write_video"]

SUFFIXES = (".mp4", ".gif")
MAXIMUM_GIF_FPS = 50  # delays are whole hundredths of a second, and viewers ignore one of 1

# Share of the raw frames that a file may take: generous, since noise hardly compresses.
BYTES_PER_PIXEL = {".mp4": 0.5, ".gif": 1.2}


def check_destination(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Raise if a file cannot be written there, by writing an empty hidden one beside it."""
    folder = path.parent
    if path.is_dir():
        raise GenerateError(f"{option} {path} is a folder", hint=f"{option} {path / path.name}.mp4")
    if not folder.is_dir():
        raise GenerateError(
            f"the folder {folder} of {option} {path} does not exist", hint=f"mkdir -p {folder}"
        )
    if path.exists() and not overwrite:
        raise GenerateError(
            f"{path} exists already", hint=f"--overwrite, or {option} {free_name(path)}"
        )
    with _wordy_errors(path), _temporary_beside(path):
        pass


def check_space(path: Path, frames: int, height: int, width: int) -> None:
    """Raise if the disk has clearly too little room for a video of this size."""
    needed = int(frames * height * width * BYTES_PER_PIXEL[path.suffix.lower()]) + (1 << 20)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise GenerateError(
            f"the disk of {path.parent} has {_megabytes(free)} free, and the video may need "
            f"{_megabytes(needed)}",
            hint="--output a path on another disk",
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def write_video(frames: Any, path: Path, fps: float, *, overwrite: bool) -> Path:
    """Write uint8 frames ``[T, H, W, 3]`` and return where: under another free name if somebody
    else took ``path`` meanwhile and it may not be overwritten."""
    encode = _encode_gif if path.suffix.lower() == ".gif" else _encode_mp4
    return _write_whole(path, lambda temporary: encode(frames, temporary, fps), overwrite=overwrite)


def write_text(text: str, path: Path, *, overwrite: bool) -> Path:
    """Write a text file the same way."""
    return _write_whole(
        path, lambda temporary: _keep(temporary.write_text(text, "utf-8")), overwrite=overwrite
    )


def _keep(_: Any) -> None:
    return None


def _write_whole(path: Path, write: Callable[[Path], None], *, overwrite: bool) -> Path:
    with _wordy_errors(path), _temporary_beside(path) as temporary:
        write(temporary)
        if not overwrite:
            return _link_to_free_name(temporary, path)
        temporary.replace(path)
        return path


def _link_to_free_name(temporary: Path, path: Path) -> Path:
    """Give the file its name without ever replacing another one."""
    while True:
        candidate = free_name(path)
        try:
            os.link(temporary, candidate)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            temporary.replace(candidate)  # a file system without hard links
        return candidate


def free_name(path: Path) -> Path:
    """``path``, or the first of ``name-1.mp4``, ``name-2.mp4``, ... that does not exist."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return candidate


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """An empty hidden file in the same folder, removed at the end if it still exists."""
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem[:40]}-", suffix=path.suffix.lower(), dir=path.parent
    )
    temporary = Path(name)
    try:
        os.close(handle)
        temporary.chmod(_ordinary_mode(path))
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _ordinary_mode(path: Path) -> int:
    """The permissions a new file gets here, or those of the file that is replaced."""
    if path.is_file():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextlib.contextmanager
def _wordy_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            raise GenerateError(
                f"no space left on the disk of {path.parent}; {path.name} was not written",
                hint="--output a path on another disk",
            ) from error
        detail = error.strerror or " ".join(str(error).split())[:300]
        raise GenerateError(f"{path} cannot be written: {detail}") from error


def _encode_mp4(frames: Any, temporary: Path, fps: float) -> None:
    """H.264 in the pixel format that every player shows."""
    import imageio
    import imageio_ffmpeg

    writer = imageio.get_writer(
        temporary, format="FFMPEG", mode="I", fps=fps, codec="libx264", quality=8,
        pixelformat="yuv420p", macro_block_size=2, ffmpeg_log_level="error",
    )  # fmt: skip
    with writer:
        for frame in frames:
            writer.append_data(frame)
    # The encoder is another process; that it ended well shows only in the file it left.
    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
    except Exception as error:
        raise OSError(f"the encoder left no readable video ({error})") from error
    if written != len(frames):
        raise OSError(f"the encoder wrote {written} of {len(frames)} frames")


def _encode_gif(frames: Any, temporary: Path, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        temporary, format="GIF", save_all=True, append_images=images[1:], loop=0,
        duration=10 * max(2, round(100 / fps)),
    )  # fmt: skip
