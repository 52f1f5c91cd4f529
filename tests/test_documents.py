"""What the documents tell people to type works as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from polyattn.testing import fake_distribution

ROOT = Path(__file__).parent.parent
PROGRAM = str(Path(sys.executable).with_name("polyattn"))
SEVERAL = "# torchrun --nproc-per-node 2 "
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/reference.md", "demo/README.md", "kernels/README.md"]
)
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    found = blocks(ROOT / page, "python")
    assert found
    for block in found:
        command = [sys.executable, "-c", block]
        if block.startswith(SEVERAL):  # the first line says how the file is run
            script = tmp_path / block.splitlines()[0].split()[-1]
            script.write_text(block)
            command = [sys.executable, *TORCHRUN, str(script)]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr


def commands() -> list[str]:
    return [
        line.removeprefix("$ ")
        for page in PAGES
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


@pytest.mark.parametrize("command", commands())
def test_commands_run(command: str, tmp_path: Path) -> None:
    program, *words = shlex.split(command)
    several = "torchrun --nproc-per-node 2 -m polyattn"
    start = [PROGRAM]
    if command.startswith(several):
        words = shlex.split(command.removeprefix(several))
        start = [sys.executable, *TORCHRUN, "-m", "polyattn"]
    else:
        assert program == "polyattn"
    if words[0] == "generate":  # as written, but for the number of steps
        words += ["--num-inference-steps", "1"]
    answer = subprocess.run([*start, *words], capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    if words[0] == "generate":
        assert (tmp_path / "polyattn.mp4").stat().st_size > 1000


def test_the_readme_shows_the_matrix_as_printed() -> None:
    answer = subprocess.run(
        [PROGRAM, "matrix", "--markdown"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() in README


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_backend_of_the_tutorial_conforms(tmp_path: Path) -> None:
    page = ROOT / "docs" / "write-a-backend.md"
    files = {}
    for block in blocks(page, "python") + blocks(page, "toml"):
        first, _, rest = block.partition("\n")
        files[first.removeprefix("# file: ")] = rest
    assert 'chunked = "polyattn_chunked"' in files["pyproject.toml"]
    site = tmp_path / "site"
    modules = {
        name.removesuffix(".py").replace("/", "."): text
        for name, text in files.items()
        if name.startswith("polyattn_chunked/") and not name.endswith("__init__.py")
    }
    fake_distribution(
        site, "polyattn-chunked", "1.0", {"chunked": "polyattn_chunked"}, modules,
        requires=("polyattn>=0.1", "torch>=2.8"),
    )  # fmt: skip
    (site / "polyattn_chunked" / "__init__.py").write_text(files["polyattn_chunked/__init__.py"])
    (tmp_path / "test_conformance.py").write_text(files["tests/test_conformance.py"])
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_conformance.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr
    assert re.search(r"\d{2} passed", answer.stdout)
