"""A model in diffusers' folder layout, local or on the Hugging Face Hub, read without its weights.

:func:`open_model` tells a path from a Hub id, and a :class:`ModelFolder` reads the small JSON files
that say what the model is and which sizes it can make. torch and diffusers are not needed.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyattn.errors import GenerateError

__all__ = ["DEFAULTS_FILE", "ModelFolder", "open_model"]

DEFAULTS_FILE = "polyattn_defaults.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelFolder:
    """Where a model is: ``location`` is what diffusers loads from."""

    location: str
    local: bool

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The mapping in one of the folder's JSON files; None when there is no such file."""
        path = Path(self.location) / name if self.local else _from_hub(self.location, name)
        if path is None or not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise GenerateError(f"cannot read {path}: {error}") from error
        if not isinstance(value, dict):
            raise GenerateError(f"{path} holds a {type(value).__name__}, expected a mapping")
        return value

    def class_name(self) -> str:
        """The pipeline's class according to ``model_index.json``."""
        index = self.read_json("model_index.json")
        if index is None:
            raise GenerateError(
                f"{self.location} is not a diffusers model: it has no model_index.json"
                + self._contents()
            )
        name = index.get("_class_name")
        if not isinstance(name, str) or not name:
            raise GenerateError(f"model_index.json of {self.location} names no pipeline class")
        return name

    def _contents(self) -> str:
        if not self.local:
            return ""
        names = sorted(each.name for each in Path(self.location).iterdir())[:6]
        return f" (found: {', '.join(names)})" if names else " (the folder is empty)"


def open_model(path_or_id: str | None) -> ModelFolder:
    """The model at a path, the one with a Hub id, or (for None) the embedded demo model."""
    if path_or_id is None:
        return ModelFolder(str(_demo_model()), local=True)
    if not path_or_id.strip():
        raise GenerateError(
            "--model-path is empty", hint="--model-path FOLDER, or a Hub id ORG/NAME"
        )
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return ModelFolder(str(path), local=True)
    if path.exists():
        raise GenerateError(
            f"{path_or_id} is a file; a model is a folder with a model_index.json in it"
        )
    if HUB_ID.fullmatch(path_or_id):
        if find_spec("huggingface_hub") is None:
            raise GenerateError(
                f"there is no folder {path_or_id!r}, and looking on the Hub needs huggingface_hub",
                hint='pip install "polyattn[diffusers]"',
            )
        return ModelFolder(path_or_id, local=False)
    raise GenerateError(
        f"there is no model folder {path_or_id!r}",
        hint="--model-path FOLDER, or a Hub id ORG/NAME",
    )


def _demo_model() -> Path:
    try:
        demo = importlib.import_module("polyattn_demo")
    except ModuleNotFoundError:
        raise GenerateError(
            "no --model-path was given, and the demo model is not installed",
            hint='pip install "polyattn[demo]"',
        ) from None
    try:
        return Path(demo.model_path())
    except FileNotFoundError as error:
        raise GenerateError(
            f"no --model-path was given, and {error}", hint='pip install "polyattn[demo]"'
        ) from error


def _from_hub(repository: str, name: str) -> Path | None:
    """One file of a Hub repository, downloaded or from the cache; None when it has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except errors.GatedRepoError as error:
        raise GenerateError(
            f"the model {repository} on the Hub asks for an agreement first",
            hint=f"hf auth login, after accepting it on https://huggingface.co/{repository}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise GenerateError(
            f"there is no folder {repository!r}, and no model {repository} on the Hub (or it is "
            "private)",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repository, error) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> GenerateError:
    detail = " ".join(str(error).split()).split(". ")[0]
    return GenerateError(
        f"there is no folder {repository!r}, and the model {repository} cannot be fetched from the "
        f"Hub: {detail[:300]}",
        hint="--model-path FOLDER, with the model already on this machine",
    )
