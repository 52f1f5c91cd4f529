"""The repository keeps its own rules: one version, folders that name things, no stray words."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import importlib_metadata
import pytest

ROOT = Path(__file__).parent.parent
VERSION = (ROOT / "VERSION").read_text().strip()
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
DISTRIBUTIONS = ["core", "kernels", *(f"plugins/{name}" for name in PLUGINS), "demo"]


def tracked(*patterns: str) -> list[Path]:
    answer = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if answer.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in answer.stdout.splitlines()]


def test_one_version_for_all() -> None:
    others = [f"polyattn-{each}" for each in ("demo", "kernels", *PLUGINS)]
    for name in ("polyattn", *others):
        assert importlib_metadata.version(name) == VERSION, name


def test_extras_are_the_plugin_folders() -> None:
    metadata = importlib_metadata.metadata("polyattn")
    extras = set(metadata.get_all("Provides-Extra") or ())
    assert extras == {*PLUGINS, "all", "demo", "diffusers", "testing"}
    wanted = [text for text in metadata.get_all("Requires-Dist") or () if "extra ==" in text]
    for name in PLUGINS:
        assert any(
            text.startswith(f"polyattn-{name}=={VERSION}")
            and f'extra == "{name}"' in text.replace("'", '"')
            for text in wanted
        ), name


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_folder_names_everything(name: str) -> None:
    points = importlib_metadata.distribution(f"polyattn-{name}").entry_points
    (point,) = [each for each in points if each.group == "polyattn.backends"]
    assert (point.name, point.value) == (name, f"polyattn_{name}")
    package = ROOT / "plugins" / name / "src" / f"polyattn_{name}"
    for file in ("__init__.py", "config.py", "attention.py", "py.typed"):
        assert (package / file).is_file(), file
    assert (ROOT / "plugins" / name / "tests" / "test_conformance.py").is_file()
    pyproject = (ROOT / "plugins" / name / "pyproject.toml").read_text()
    major_minor = ".".join(VERSION.split(".")[:2])
    assert f'"polyattn>={major_minor},' in pyproject
    # Block-sparse attention is for those that say so: dense plugins do without it.
    uses_kernels = any("polyattn_kernels" in file.read_text() for file in package.rglob("*.py"))
    assert (f'"polyattn-kernels>={major_minor},' in pyproject) == uses_kernels


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_every_distribution_carries_the_licence_and_its_types(folder: str) -> None:
    assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert list((ROOT / folder).glob("src/*/py.typed"))


def test_core_imports_no_plugin_and_no_kernel() -> None:
    for file in (ROOT / "core" / "src").rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                assert package == "polyattn_demo" or not package.startswith("polyattn_"), file


def test_no_module_imports_torch_where_it_promises_not_to() -> None:
    code = (
        "import sys, polyattn, polyattn.cli; polyattn.backends(); polyattn.select; "
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_weights_are_small() -> None:
    files = list((ROOT / "demo" / "src" / "polyattn_demo" / "model").rglob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    assert files
    assert sum(sizes) <= 20_000_000
    assert max(sizes) < 10_000_000


def test_no_absolute_paths_or_leftovers() -> None:
    word = re.compile(r"/(root|home|work|tmp)/\w|\bTO" + r"DO\b|\bFIX" + r"ME\b")
    for file in tracked("*.py", "*.md", "*.toml", "*.json", "*.txt", "Makefile", ".ci/run"):
        if file.exists():
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                assert not word.search(line), f"{file.relative_to(ROOT)}:{number}: {line[:120]}"
