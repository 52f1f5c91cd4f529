"""The repository's sessions: `nox -s demo`, `nox -s tests`, ...; `nox` alone runs what CI runs.

Everything is derived from the folders: every `plugins/<id>` with a pyproject.toml is a plugin, and
the Python versions are those of the classifiers in core/pyproject.toml. Every install obeys
constraints/cpu.txt, so that no session downloads a CUDA build of torch.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
DISTRIBUTIONS = ["core", "kernels", *(f"plugins/{name}" for name in PLUGINS), "demo"]
VERSION = (ROOT / "VERSION").read_text().strip()
PYTHONS = re.findall(r'Python :: (3\.\d+)"', (ROOT / "core" / "pyproject.toml").read_text())
TORCH_PYTHON = "3.11"  # the version constraints/cpu.txt pins a CPU build of torch for

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"  # uv would fetch CUDA torch, it ignores find-links
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests", "torch_free", "none", "alone", "install"]

PYTEST = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]
INTERPRETER = ["triton==3.6.0", "numpy<2.3"]  # runs Triton's kernels on a CPU
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

wheelhouse: list[Path] = []  # where this run's wheels are, once they are built


def pip_install(session: nox.Session, *what: str) -> None:
    session.install("-c", str(ROOT / "constraints" / "cpu.txt"), *what)


def install_workspace(session: nox.Session, *extra: str) -> None:
    """Every distribution of the repository, editable, with all extras, on one command line."""
    editable = [word for path in DISTRIBUTIONS[1:] for word in ("-e", f"./{path}")]
    pip_install(session, "-e", "./core[all,testing]", *editable, *extra)


def build_wheels(session: nox.Session) -> Path:
    """Wheels of every distribution, built once for all sessions of a run."""
    if not wheelhouse:
        house = Path(session.create_tmp()).resolve() / "wheelhouse"
        shutil.rmtree(house, ignore_errors=True)
        paths = [f"./{path}" for path in DISTRIBUTIONS]
        session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(house), *paths)
        wheelhouse.append(house)
    return wheelhouse[0]


def needs(house: Path, wanted: str) -> tuple[list[str], list[str]]:
    """What `wanted` (such as `polyattn[all]`) needs: of our own distributions, and of others."""
    metadata = {}
    for wheel in house.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
            message = email.message_from_bytes(archive.read(name))
        metadata[message["Name"]] = message.get_all("Requires-Dist") or []
    ours: set[str] = set()
    others: set[str] = set()
    queue = [Requirement(wanted)]
    seen: set[str] = set()
    while queue:
        need = queue.pop()
        if str(need) in seen:
            continue
        seen.add(str(need))
        if need.name not in metadata:
            need.marker = None
            others.add(str(need))
            continue
        ours.add(need.name)
        for text in metadata[need.name]:
            inner = Requirement(text)
            extras = need.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                queue.append(inner)
    return sorted(ours), sorted(others)


def install_as_users_do(session: nox.Session, wanted: str, *tools: str) -> None:
    """Install `wanted` from freshly built wheels, as `pip install NAME` will from an index.

    What comes from outside is installed first; our own names are then taken from the wheels alone,
    so that nothing on an index can stand in for them.
    """
    house = build_wheels(session)
    ours, others = needs(house, wanted)
    pip_install(session, *others, *tools)
    from_wheels = ["--no-index", "--find-links", str(house), "--force-reinstall", "--no-deps"]
    session.install(*from_wheels, *ours)
    session.run("python", "-m", "pip", "check", silent=True)


@nox.session(python=TORCH_PYTHON)
def demo(session: nox.Session) -> None:
    """Write demo.mp4 from a text prompt with the embedded model (arguments go to `generate`)."""
    install_workspace(session)
    arguments = session.posargs or ["--output", "demo.mp4", "--overwrite"]
    session.run("polyattn", "generate", *arguments)


@nox.session(python=TORCH_PYTHON)
def tests(session: nox.Session) -> None:
    """The whole test suite with everything installed (arguments go to pytest)."""
    install_workspace(session, *PYTEST, *INTERPRETER)
    environment = {**ONE_THREAD, "TRITON_INTERPRET": "1"}
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, env=environment)


@nox.session(python=TORCH_PYTHON)
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=TORCH_PYTHON)
def types(session: nox.Session) -> None:
    """mypy --strict over every distribution."""
    install_workspace(session, "mypy==2.4.1", "types-PyYAML", "pytest>=8")
    session.run("mypy", *(f"{path}/src" for path in DISTRIBUTIONS))


@nox.session(python=PYTHONS)
def torch_free(session: nox.Session) -> None:
    """What must work without torch, on every supported Python."""
    session.install("-e", "./core", *PYTEST)
    session.run("python", "-c", "import importlib.util as u; assert not u.find_spec('torch')")
    session.run("python", "-m", "pytest", "core/tests/torch_free", *session.posargs)


@nox.session(python=TORCH_PYTHON)
def none(session: nox.Session) -> None:
    """Core without any plugin: helpful messages, no traceback."""
    install_as_users_do(session, "polyattn", *PYTEST)
    session.run("python", "-m", "pytest", "tests/without_plugins", *session.posargs)


@nox.session(python=TORCH_PYTHON)
def alone(session: nox.Session) -> None:
    """Core and one plugin with what it needs, from wheels: lists that one, passes its tests.

    For each plugin in turn (arguments: for these). Plugins that need the same of others share an
    environment, in which only our own distributions change.
    """
    house = build_wheels(session)
    ours = {"polyattn", *(f"polyattn-{name}" for name in (*PLUGINS, "kernels", "demo"))}
    wanted = [each for each in PLUGINS if each in session.posargs or not session.posargs]
    installed: list[str] | None = None
    for plugin in sorted(wanted, key=lambda each: needs(house, f"polyattn[{each}]")[1]):
        folder = ROOT / "plugins" / plugin / "tests"
        # Some tests restate a method in numpy, which no plugin needs.
        restated = any("import numpy" in file.read_text() for file in folder.glob("*.py"))
        tools = [*PYTEST, *(["numpy"] if restated else [])]
        others = [*needs(house, f"polyattn[{plugin}]")[1], *tools]
        # Whatever an earlier plugin, or an earlier run, has left. torch takes long to install.
        there = session.run("python", "-m", "pip", "list", "--format=json", silent=True) or "[]"
        names = {each["name"] for each in json.loads(there)} - {"torch", "pip"}
        if removed := sorted(names & ours if installed == others else names):
            session.run("python", "-m", "pip", "uninstall", "-q", "-y", *removed)
        install_as_users_do(session, f"polyattn[{plugin}]", *tools)
        installed = others
        listed = json.loads(session.run("polyattn", "backends", "--json", silent=True) or "")
        found = {each["distribution"] for each in listed["backends"]}
        if found != {f"polyattn-{plugin}"} or listed["findings"]:
            session.error(f"expected polyattn-{plugin} alone and no findings, found {listed}")
        # File by file: the conformance kit's last test judges what ran before it in its process.
        workers = ["-n", "2", "--dist", "loadfile"]
        session.run("python", "-m", "pytest", *workers, str(folder), env=ONE_THREAD)


@nox.session(python=TORCH_PYTHON)
def install(session: nox.Session) -> None:
    """`pip install "polyattn[all]"` from wheels, then the commands a user types first."""
    install_as_users_do(session, "polyattn[all]")
    folder = Path(session.create_tmp()).resolve() / "elsewhere"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    session.chdir(folder)
    session.run("polyattn", "backends")
    session.run("polyattn", "doctor")
    session.run("polyattn", "generate", "--num-inference-steps", "2", "--output", "video.mp4")
    if not os.path.getsize("video.mp4"):
        session.error("generate wrote an empty video")
