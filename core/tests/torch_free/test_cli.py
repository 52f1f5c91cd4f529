"""The command line, against fake plugins written to a folder as an installer would leave them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from polyattn import selection, settings
from polyattn.cli import SUMMARIES, doctor, main, trial
from polyattn.discovery import registry

EXACT = """
from polyattn.contract import Architectures, BackendSpec, Capabilities
from polyattn.hooks import hookimpl

SPEC = BackendSpec(
    name="toy_exact", aliases={"toy": {}}, summary="Exact", kind="exact",
    capabilities=Capabilities(
        platforms={"cpu": Architectures(), "cuda": Architectures(minimum="8.0")},
        dtypes=("float16", "bfloat16"), custom_scale=True,
    ),
    implementation="MODULE:build",
)

@hookimpl
def polyattn_backends():
    return [SPEC]

def build(config, request, environment):
    import torch
    def run(q, k, v, call):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return run
"""

SPARSE = """
from typing import Literal
from pydantic import AliasChoices, Field
from polyattn.contract import (
    Architectures, BackendSpec, Capabilities, Reason, Requirement, ScheduledConfig,
)
from polyattn.hooks import hookimpl

class Config(ScheduledConfig):
    sparsity: float = Field(0.5, ge=0, le=1, description="Share of blocks left out.")
    path: str | None = None
    tile: tuple[int, int, int] = (4, 4, 4)
    names: list[str] = Field(default_factory=list)
    mode: Literal["fast", "safe"] = Field(
        "fast", validation_alias=AliasChoices("mode", "TOY_mode"))
    needed: int

SPEC = BackendSpec(
    name="toy_sparse", aliases={"toy7": {"sparsity": 0.7}}, summary="Sparse", kind="sparse",
    capabilities=Capabilities(
        platforms={"cuda": Architectures(minimum="9.0", only=("9.0", "10.0"))},
        dtypes=("bfloat16",), needs_grid=True,
    ),
    config=Config, implementation="MODULE:build",
    requirements=(Requirement(distribution="toy-kernel", specifier=">=2",
                              hint="pip install toy-kernel"),),
    footnotes={"cuda": "Hopper | Blackwell.", "general": "A toy."},
)

@hookimpl
def polyattn_backends():
    return [SPEC]
"""

BROKEN = "import a_module_that_does_not_exist"


class Plugins:
    """A folder on the path with distributions in it, and the command line that sees only them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def add(self, name: str, code: str, *, version: str = "1.0") -> None:
        module = f"fake_{name}"
        self.folder.joinpath(f"{module}.py").write_text(code.replace("MODULE", module))
        self.distribution(f"fake-{name}", version)
        points = f"[polyattn.backends]\n{name} = {module}\n"
        self.folder.joinpath(f"fake_{name}-{version}.dist-info/entry_points.txt").write_text(points)
        self.names.append(name)

    def distribution(self, name: str, version: str, *requires: str) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if "POLYATTN" not in key}
        return {
            **kept,
            "PYTHONPATH": str(self.folder),
            "POLYATTN_PLUGINS": ",".join(self.names),
            **variables,
        }

    def process(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "polyattn", *arguments],
            capture_output=True,
            text=True,
            env=self.environment(**variables),
            timeout=60,
            check=False,
        )


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    for name in [*os.environ]:
        if name.startswith("POLYATTN_") or name == "DIFFUSERS_ATTN_BACKEND":
            monkeypatch.delenv(name)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(settings, "_settings", None)
    modules = set(sys.modules)
    _forget()
    yield Plugins(folder)
    _forget()
    for name in set(sys.modules) - modules:
        if name.startswith("fake_"):
            del sys.modules[name]


def _forget() -> None:
    registry.cache_clear()
    selection.local_environment.cache_clear()
    selection._log_once.cache_clear()


@pytest.fixture
def run(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in this process, on a machine that is a plain CPU by default."""

    def invoke(*arguments: str) -> Result:
        if "POLYATTN_PLUGINS" not in os.environ:
            monkeypatch.setenv("POLYATTN_PLUGINS", ",".join(plugins.names))
        _forget()
        monkeypatch.setattr(settings, "_settings", None)
        return CliRunner().invoke(main, list(arguments))

    return invoke


def parsed(result: Result, *, exit_code: int = 0) -> Any:
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


# --- the group ------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_none(plugins: Plugins) -> None:
    code = (
        "import sys\nfrom polyattn.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'pydantic', 'rich', 'polyattn.contract'} & {*sys.modules}\n"
        "heavy |= {name for name in sys.modules if name.startswith('polyattn.cli.')}\n"
        "print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plugins.environment()
    )
    assert "heavy: []" in done.stdout, done
    for name, summary in SUMMARIES.items():
        assert f"{name}" in done.stdout
        assert summary in done.stdout


def test_listing_imports_neither_torch_nor_diffusers(plugins: Plugins) -> None:
    plugins.add("exact", EXACT)
    code = (
        "import sys\nfrom polyattn.cli import main\n"
        "main(['backends'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'diffusers', 'numpy'} & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plugins.environment()
    )
    assert "toy_exact" in done.stdout, done
    assert "heavy: []" in done.stdout


def test_version_is_that_of_the_distribution(run: Callable[..., Result]) -> None:
    import importlib_metadata

    assert run("--version").stdout == f"polyattn {importlib_metadata.version('polyattn')}\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("backend", "backends"), ("docter", "doctor"), ("expalin", "explain")]
)
def test_a_misspelt_command_names_the_nearest(
    run: Callable[..., Result], typed: str, meant: str
) -> None:
    result = run(typed)
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean {meant}" in result.stderr


def test_a_command_like_nothing_known_gets_no_suggestion(run: Callable[..., Result]) -> None:
    result = run("zzzz")
    assert result.exit_code == 2
    assert "Did you mean" not in result.stderr


@pytest.mark.parametrize("name", [name for name in SUMMARIES if name != "generate"])
def test_every_command_has_help_and_debug(run: Callable[..., Result], name: str) -> None:
    for _ in range(2):  # the option is added to the command once, not once per look
        result = run(name, "--help")
        assert result.exit_code == 0
        assert result.stdout.count("--debug") == 1


def test_completion_offers_commands_without_importing_them(plugins: Plugins) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "from polyattn.cli import main; main(prog_name='polyattn')",
        ],
        capture_output=True,
        text=True,
        env=plugins.environment(
            _POLYATTN_COMPLETE="bash_complete", COMP_WORDS="polyattn do", COMP_CWORD="1"
        ),
    )
    assert "plain,doctor" in done.stdout.split(), done.stdout
    assert "polyattn.cli.doctor" not in done.stderr


def test_errors_are_messages_and_tracebacks_only_on_demand(plugins: Plugins) -> None:
    plugins.add("exact", EXACT)
    plain = plugins.process("config", "nosuch")
    assert plain.returncode == 1
    assert plain.stdout == ""
    assert plain.stderr.startswith("error: there is no installed backend 'nosuch'")
    assert "Traceback" not in plain.stderr
    assert "\x1b" not in plain.stderr
    for arguments, variables in (
        (["--debug", "config", "nosuch"], {}),
        (["config", "nosuch", "--debug"], {}),
        (["config", "nosuch"], {"POLYATTN_DEBUG": "1"}),
    ):
        loud = plugins.process(*arguments, **variables)
        assert loud.returncode == 1
        assert "Traceback" in loud.stderr
        assert "UnknownBackendError" in loud.stderr


def test_a_missing_torch_is_a_message(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any) -> None:
        raise ModuleNotFoundError("needs torch\n  Try: pip install torch", name="torch")

    monkeypatch.setattr("polyattn.cli.backends.machine", lacking)
    result = run("backends")
    assert result.exit_code == 1
    assert result.stderr == "error: needs torch\n  Try: pip install torch\n"


def test_a_bug_is_not_dressed_up_as_a_message(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'helper'", name="helper")

    monkeypatch.setattr("polyattn.cli.backends.machine", buggy)
    assert isinstance(run("backends").exception, ModuleNotFoundError)


def test_interrupt_exits_130_without_a_traceback(plugins: Plugins) -> None:
    # Where tests run in the background, an interrupt may be ignored from the start.
    source = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    plugins.add("slow", source)
    done = plugins.process("backends")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["backends"], ["backends", "--json"]])
def test_a_closed_pipe_is_silent(plugins: Plugins, arguments: list[str]) -> None:
    plugins.add("exact", EXACT)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "polyattn", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=plugins.environment(),
    )
    os.close(writing)
    assert done.stderr == ""


# --- backends -------------------------------------------------------------------------------------


def test_backends_lists_usable_and_unusable_with_every_reason(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)
    data = parsed(run("backends", "--json", "--assume", "cpu"))
    by_name = {each["name"]: each for each in data["backends"]}
    assert by_name["toy_exact"]["usable"]
    assert by_name["toy_exact"]["reasons"] == []
    assert by_name["toy_exact"]["distribution"] == "fake-exact"
    assert by_name["toy_exact"]["version"] == "1.0"
    assert by_name["toy_exact"]["aliases"] == ["toy"]
    codes = [reason["code"] for reason in by_name["toy_sparse"]["reasons"]]
    assert codes == ["platform", "requirement-missing"]
    text = run("backends", "--assume", "cpu").stdout
    assert "toy_sparse cannot run here:" in text
    assert "- needs cuda, found cpu" in text
    assert "try: pip install toy-kernel\n" in text


def test_assume_changes_the_answer(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)

    def usable(*assume: str) -> set[str]:
        data = parsed(run("backends", "--json", *(f"--assume={each}" for each in assume)))
        return {each["name"] for each in data["backends"] if each["usable"]}

    assert usable("cpu") == {"toy_exact"}
    assert usable("cuda:7.5") == set()
    assert usable("cuda:9.0") == {"toy_exact"}
    assert usable("cuda:9.0,toy-kernel:2.1") == {"toy_exact", "toy_sparse"}
    assert usable("cuda:9.0", "toy-kernel:2.1") == {"toy_exact", "toy_sparse"}
    assert usable("cuda:8.0,toy-kernel:2.1") == {"toy_exact"}


def test_a_bad_assumption_is_an_error(run: Callable[..., Result]) -> None:
    for command in ("backends", "explain"):
        result = run(command, "--assume", "cuda:new")
        assert result.exit_code == 1
        assert "cuda:new is not a compute capability" in result.stderr
    data = parsed(run("backends", "--assume", "what?", "--json"), exit_code=1)
    assert data["error"]["type"] == "InputError"
    assert data["error"]["hint"] == "--assume cuda:9.0,torch:2.11"


def test_broken_plugins_become_findings_beside_the_others(plugins: Plugins) -> None:
    plugins.add("exact", EXACT)
    plugins.add("broken", BROKEN)
    plugins.add("loud", "print('hello from a plugin')\n" + EXACT.replace("toy", "loud"))
    plugins.add("one", EXACT.replace("toy", "same"))
    plugins.add("two", EXACT.replace("toy", "same"))
    done = plugins.process("backends", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    data = json.loads(done.stdout)  # whatever a plugin prints is not in it
    assert {each["name"] for each in data["backends"]} == {"toy_exact", "loud_exact"}
    found = {(each["distribution"], each["stage"], each["severity"]) for each in data["findings"]}
    assert ("fake-broken", "import", "error") in found
    assert ("fake-loud", "output", "warning") in found
    assert {name for name, stage, _ in found if stage == "conflict"} == {"fake-one", "fake-two"}

    plain = plugins.process("backends")
    assert plain.returncode == 0
    assert "fake-broken 1.0: error at the stage import" in plain.stdout
    assert "a_module_that_does_not_exist" in plain.stdout
    assert "Traceback" not in plain.stdout
    assert "\x1b" not in plain.stdout
    assert 'File "' not in plain.stdout
    assert 'File "' in plugins.process("backends", "-v").stdout


def test_no_backend_is_an_answer_and_says_what_to_type(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyattn.cli.backends.limits", dict)
    result = run("backends")
    assert result.exit_code == 0
    assert 'try: pip install "polyattn[sdpa]"' in result.stdout


def test_an_empty_limit_is_named_as_the_cause(plugins: Plugins, run: Callable[..., Result]) -> None:
    result = run("backends")  # no plugin was added, so POLYATTN_PLUGINS is empty
    assert result.exit_code == 0
    assert "because of POLYATTN_PLUGINS=''" in result.stdout
    assert "try: unset POLYATTN_PLUGINS" in result.stdout
    data = parsed(run("backends", "--json"))
    assert data["backends"] == []
    assert data["limited_by"] == {"POLYATTN_PLUGINS": ""}


def test_a_broken_plugin_is_named_as_the_cause(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("broken", BROKEN)
    text = run("backends").stdout
    assert text.startswith("No backend could be loaded; the findings below say why.")
    assert "POLYATTN_PLUGINS=broken limits what is loaded." in text


def test_piped_output_is_neither_cut_nor_wrapped(plugins: Plugins) -> None:
    long_hint = "pip install " + "a-very-long-requirement " * 12
    name = "toy_sparse_" + "x" * 60
    code = SPARSE.replace("pip install toy-kernel", long_hint).replace("toy_sparse", name)
    plugins.add("sparse", code)
    text = plugins.process("backends", COLUMNS="40").stdout
    assert f"try: {long_hint.strip()}" in text
    assert any(line.startswith(f"{name}  toy7") for line in text.splitlines())


def test_a_terminal_of_80_columns_is_enough(plugins: Plugins) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)
    for arguments in (["backends"], ["matrix"], ["config", "toy_sparse"]):
        done = plugins.process(*arguments, FORCE_COLOR="1", NO_COLOR="1", COLUMNS="80")
        assert done.returncode == 0
        text = re.sub("\x1b\\[[0-9;]*m", "", done.stdout)
        assert text != done.stdout  # it did take itself to be on a terminal
        lines = [line for line in text.splitlines() if "try:" not in line]
        assert lines
        assert max(map(len, lines)) <= 80
        assert "…" not in done.stdout


def test_control_characters_of_a_plugin_do_not_reach_the_terminal(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("rude", 'raise RuntimeError("\\x1b[2J gone \\u2603")')
    text = run("backends").stdout
    assert "\x1b" not in text
    assert "\\x1b[2J gone" in text


def test_an_ascii_terminal_gets_escapes_not_an_exception(plugins: Plugins) -> None:
    plugins.add("exact", EXACT)
    done = plugins.process("matrix", "--markdown", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "\\u2705" in done.stdout


# --- matrix ---------------------------------------------------------------------------------------


def test_matrix_holds_platforms_architectures_and_footnotes(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)
    data = parsed(run("matrix", "--json"))
    assert data["platforms"] == ["cuda", "rocm", "mps", "npu", "xpu", "cpu"]
    assert [each["name"] for each in data["backends"]] == ["toy_exact", "toy_sparse"]
    exact, sparse = (each["platforms"] for each in data["backends"])
    assert exact["cpu"]["supported"]
    assert not exact["rocm"]["supported"]
    assert exact["cuda"]["minimum"] == "8.0"
    assert sparse["cuda"]["only"] == ["9.0", "10.0"]
    assert sparse["cuda"]["footnote"] == "Hopper | Blackwell."
    text = run("matrix").stdout.splitlines()
    assert text[0].split() == ["backend", "CUDA", "ROCm", "MPS", "NPU", "XPU", "CPU"]
    assert text[1].split() == ["toy_exact", "yes", "8.0+", "-", "-", "-", "-", "yes"]
    assert text[2].split()[:5] == ["toy_sparse", "[1]", "yes", "9.0+", "[2][3]"]
    assert text[-3:] == ["[1] A toy.", "[2] CUDA: only 9.0, 10.0.", "[3] Hopper | Blackwell."]


def test_matrix_as_markdown(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)
    lines = run("matrix", "--markdown").stdout.splitlines()
    assert lines[0] == "| Backend | CUDA | ROCm | MPS | NPU | XPU | CPU |"
    assert lines[1] == "| --- | :-: | :-: | :-: | :-: | :-: | :-: |"
    assert lines[2] == "| `toy_exact` | ✅ 8.0+ | ❌ | ❌ | ❌ | ❌ | ✅ |"
    assert lines[-1] == "<sup>3</sup> Hopper | Blackwell."
    assert run("matrix", "--markdown", "--json").exit_code == 2


def test_matrix_has_a_column_for_a_platform_a_plugin_brings(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("new", EXACT.replace('"cpu": Arch', '"tpu": Arch'))
    data = parsed(run("matrix", "--json"))
    assert data["platforms"][-1] == "tpu"
    assert data["backends"][0]["platforms"]["tpu"]["supported"]


def test_matrix_says_that_a_plugin_is_missing_from_it(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("exact", EXACT)
    assert run("matrix").stderr == ""
    plugins.add("broken", BROKEN)
    os.environ["POLYATTN_PLUGINS"] = ",".join(plugins.names)
    result = run("matrix", "--json")
    assert "polyattn backends" in result.stderr
    assert [each["name"] for each in parsed(result)["backends"]] == ["toy_exact"]


# --- explain --------------------------------------------------------------------------------------


def test_explain_shows_the_decision_and_its_trace(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("exact", EXACT)
    plugins.add("other", EXACT.replace("toy", "half").replace('("float16",', '("float32",'))
    arguments = ["explain", "--assume", "cpu", "--dtype", "fp16", "--head-dim", "128"]
    data = parsed(run(*arguments, "--json"))
    assert data["request"]["dtype"] == "float16"
    assert data["request"]["head_dim"] == 128
    decision = data["selection"]
    assert (decision["requested"], decision["chosen"]) == (None, "toy_exact")
    assert decision["source"] == "automatic"
    assert decision["why"]
    assert [(each["name"], each["accepted"]) for each in decision["trace"]] == [
        ("half_exact", False),
        ("toy_exact", True),
    ]
    assert decision["trace"][0]["reasons"][0]["code"] == "dtype"
    text = run(*arguments).stdout
    assert "half_exact: refused" in text
    assert "toy_exact: chosen" in text
    assert "- takes float32 or bfloat16, found float16" in text


@pytest.mark.parametrize(
    ("option", "code"),
    [
        (["--dtype", "fp32"], "dtype"),
        (["--head-dim", "2000"], "head-dim"),
        (["--causal"], "causal"),
        (["--mask", "key_padding"], "mask"),
        (["--heads", "4", "--kv-heads", "2"], "gqa"),
        (["--query-length", "4", "--key-length", "5"], "cross-attention"),
        (["--role", "cross"], "cross-attention"),
        (["--lse"], "lse"),
        (["--grad"], "autograd"),
        (["--extra", "gate"], "extras"),
    ],
)
def test_every_option_reaches_the_decision(
    plugins: Plugins, run: Callable[..., Result], option: list[str], code: str
) -> None:
    plugins.add("exact", EXACT)
    plugins.add("all", EXACT.replace("toy", "able").replace(
        'dtypes=("float16", "bfloat16")',
        'dtypes=("float16", "float32"), head_dims={"maximum": 4096}, causal=True, '
        'masks=("boolean",), gqa=True, cross_attention=True, lse=True, autograd=True, '
        'extras=("gate",)',
    ).replace('kind="exact"', 'kind="exact", priority=-1'))  # fmt: skip
    trace = parsed(run("explain", "--assume=cpu", "--json", *option))["selection"]["trace"]
    assert [each["name"] for each in trace] == ["toy_exact", "able_exact"]
    assert [reason["code"] for reason in trace[0]["reasons"]] == [code]


def test_explain_reads_grid_scale_and_batch(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("exact", EXACT)
    data = parsed(
        run("explain", "--assume=cpu", "--json", "--grid=2x3x4", "--scale=0", "--batch=2")
    )
    assert data["request"]["grid"] == [2, 3, 4]
    assert data["request"]["scale"] == 0.0
    assert data["request"]["batch"] == 2
    text = run("explain", "--assume=cpu", "--grid", "2,3,4", "--scale", "0").stdout
    assert "grid 2,3,4" in text
    assert "scale 0.0" in text


def test_explain_refuses_with_all_reasons(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)
    arguments = ["explain", "toy_sparse", "--assume", "cpu", "--attention-backend-config=needed=1"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    for words in ("needs cuda, found cpu", "needs toy-kernel >=2", "token grid", "toy_exact could"):
        assert words in result.stderr
    result = run(*arguments, "--json")
    error = parsed(result, exit_code=1)["error"]
    assert result.stderr == ""
    assert error["type"] == "BackendUnavailableError"
    assert "needs toy-kernel >=2" in error["message"]
    assert error["hint"] == "backend='toy_exact'"  # no installation helps on a CPU


def test_explain_softens_when_allowed_and_logs_nothing(
    plugins: Plugins, run: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    plugins.add("exact", EXACT)
    plugins.add("sparse", SPARSE)
    result = run("explain", "toy_sparse", "--assume=cpu", "--attention-backend-config=needed=1",
                 "--on-unavailable=fallback", "--json")  # fmt: skip
    decision = parsed(result)["selection"]
    assert decision["requested"] == "toy_sparse"
    assert decision["chosen"] == "toy_exact"
    assert result.stderr == ""
    assert caplog.records == []


def test_explain_shows_the_dense_phase_and_the_scope(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("exact", EXACT.replace("custom_scale", "cross_attention=True, custom_scale"))
    plugins.add("sparse", SPARSE)
    config = "--attention-backend-config=needed=1,dense_steps=2"
    ready = ["--assume=cuda:9.0,toy-kernel:2.0", config]
    arguments = ["explain", "toy_sparse", *ready, "--grid=2,2,2"]
    decision = parsed(run(*arguments, "--json"))["selection"]
    assert decision["chosen"] == "toy_sparse"
    assert decision["parameters"]["dense_steps"] == 2
    assert decision["dense"]["chosen"] == "toy_exact"
    assert "Dense phase" in run(*arguments).stdout
    cross = ["explain", "toy_sparse", *ready, "--role=cross"]
    assert run(*cross).exit_code == 1
    assert parsed(run(*cross, "--scope=model", "--json"))["selection"]["chosen"] == "toy_exact"


def test_explain_honours_the_global_setting(
    plugins: Plugins, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.add("exact", EXACT)
    monkeypatch.setenv("POLYATTN_BACKEND", "toy")
    decision = parsed(run("explain", "--assume=cpu", "--json"))["selection"]
    assert (decision["requested"], decision["source"]) == ("toy", "POLYATTN_BACKEND")
    monkeypatch.setenv("POLYATTN_BACKEND", "unheard_of")
    assert "POLYATTN_BACKEND" in run("explain").stderr


@pytest.mark.parametrize(
    "option",
    [
        "--dtype=int8", "--head-dim=0", "--heads=-1", "--batch=x", "--mask=square", "--scale=nan",
        "--grid=1,2", "--grid=1,0,2", "--grid=a,b,c", "--grid=1,2,3,4", "--role=", "--scope=all",
        "--on-unavailable=maybe", "--nosuch",
    ],
)  # fmt: skip
def test_explain_refuses_bad_options(run: Callable[..., Result], option: str) -> None:
    assert run("explain", option).exit_code == 2


def test_heads_are_a_multiple_of_key_heads(run: Callable[..., Result]) -> None:
    result = run("explain", "--heads=3", "--kv-heads=2")
    assert result.exit_code == 2
    assert "multiple" in result.stderr


# --- config ---------------------------------------------------------------------------------------


def test_config_describes_every_parameter(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("sparse", SPARSE)
    data = parsed(run("config", "toy_sparse", "--json"))
    rows = {each["name"]: each for each in data["parameters"]}
    assert rows["sparsity"]["type"] == "float"
    assert rows["sparsity"]["default"] == 0.5
    assert rows["sparsity"]["limits"] == ["at least 0", "at most 1"]
    assert rows["sparsity"]["description"] == "Share of blocks left out."
    assert rows["path"]["type"] == "str or none"
    assert rows["path"]["default"] is None
    assert rows["tile"] == {**rows["tile"], "type": "list of 3: int, int, int"}
    assert rows["tile"]["default"] == [4, 4, 4]
    assert rows["names"]["type"] == "list of str"
    assert rows["names"]["default"] == []
    assert rows["mode"]["type"] == "fast | safe"
    assert rows["mode"]["spellings"] == ["TOY_mode", "mode"]
    assert rows["needed"]["required"]
    assert not rows["mode"]["required"]
    assert rows["dense_steps"]["type"] == "int or float"
    text = run("config", "toy_sparse").stdout
    assert "Also accepted as" in text
    assert "TOY_mode" in text
    assert "required" in text


def test_config_of_an_alias_says_what_it_means(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("sparse", SPARSE)
    assert "toy7 means toy_sparse with sparsity=0.7" in run("config", "toy7").stdout
    data = parsed(run("config", "toy7", "--check", "needed=1", "--json"))
    assert data["parameters"]["sparsity"] == 0.7


def test_config_schema_names_the_parameters(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("sparse", SPARSE)
    schema = parsed(run("config", "toy_sparse", "--schema"))
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["needed"]
    assert {"sparsity", "mode", "dense_steps"} <= set(schema["properties"])
    assert run("config", "toy_sparse", "--schema", "--check", "needed=1").exit_code == 2


def test_config_without_parameters(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("exact", EXACT)
    assert "toy_exact has no parameters." in run("config", "toy").stdout
    assert run("config").exit_code == 2


def test_config_check_completes_or_complains(
    plugins: Plugins, run: Callable[..., Result], tmp_path: Path
) -> None:
    plugins.add("sparse", SPARSE)
    plugins.add("exact", EXACT)
    check = ["config", "toy_sparse", "--check"]
    given = "TOY_mode=safe,needed=3,"
    parameters = parsed(run(*check, given, "--json"))["parameters"]
    assert parameters["mode"] == "safe"
    assert parameters["sparsity"] == 0.5
    assert "toy_sparse accepts this configuration" in run(*check, given).stdout
    file = tmp_path / "parameters.json"
    file.write_text('{"toy_sparse": {"needed": 4}}')
    assert parsed(run(*check, str(file), "--json"))["parameters"]["needed"] == 4
    file.write_text('{"toy_exact": {}}')
    assert "no parameters of toy_sparse" in run(*check, str(file)).stderr
    for text, words in (
        ("sparsty=0.5,needed=1", "Try: sparsity"),
        ("sparsity=2,needed=1", "sparsity=2"),
        ("sparsity=0.5", "required parameter 'needed'"),
        ("nosuch.yaml", "does not exist"),
        ("{", "not valid JSON"),
    ):
        result = run(*check, text)
        assert result.exit_code == 1, text
        assert result.stdout == ""
        assert words in result.stderr
        assert parsed(run(*check, text, "--json"), exit_code=1)["error"]["type"] == "ConfigError"


def test_config_check_warns_of_what_cannot_start(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    code = SPARSE.replace("SPEC = BackendSpec(", """
def probe_request(request, config, environment):
    reasons = [Reason(code="arch", message="of this request")]
    if config.path is None:
        reasons.append(Reason(code="config", message="needs path", hint="path=FILE"))
    return reasons

def probe_config(config):
    missing = config.path == "nowhere"
    return [Reason(code="file", message="nowhere is not there")] if missing else []

SPEC = BackendSpec(probe_request=probe_request, probe_config=probe_config,""")  # fmt: skip
    plugins.add("sparse", code)
    check = ["config", "toy_sparse", "--check"]
    for text, words in (
        ("needed=1", ["needs path"]), ("needed=1,path=nowhere", ["nowhere is not there"]),
        ("needed=1,path=here", []),
    ):  # fmt: skip
        data = parsed(run(*check, text, "--json"))
        assert [each["message"] for each in data["warnings"]] == words
        shown = run(*check, text).stdout
        assert ("It cannot start a run as it is:" in shown) == bool(words)
        assert all(each in shown for each in words)


def test_config_folds_descriptions_when_piped(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("sparse", SPARSE.replace("Share of blocks left out.", "many words " * 40))
    assert max(map(len, run("config", "toy_sparse").stdout.splitlines())) < 140


# --- doctor ---------------------------------------------------------------------------------------

TORCH_WORKS = {"status": "ok", "message": None, "seconds": 1.0, "version": "2.11", "device": "cpu",
               "platform": "cpu"}  # fmt: skip


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU machine with a torch that works; no child is started."""
    from polyattn.environment import Environment

    machine = Environment.detect("cpu")
    distributions = {"polyattn": machine.distributions["polyattn"], "torch": "2.11"}
    machine = machine.model_copy(update={"torch": "2.11", "distributions": distributions})
    monkeypatch.setattr(Environment, "detect", classmethod(lambda cls, device=None: machine))
    monkeypatch.setattr(doctor, "run_trial", lambda *arguments: dict(TORCH_WORKS))


def problems(data: Any, severity: str) -> list[str]:
    return [each["message"] for each in data["problems"] if each["severity"] == severity]


@pytest.fixture
def plugins_all_types(plugins: Plugins) -> Plugins:
    plugins.add("full", EXACT.replace('"bfloat16")', '"bfloat16", "float32")'))
    return plugins


@pytest.mark.usefixtures("healthy", "plugins_all_types")
def test_doctor_finds_nothing_wrong_with_a_sound_installation(run: Callable[..., Result]) -> None:
    data = parsed(run("doctor", "--json"))
    assert data["healthy"]
    assert data["problems"] == []
    assert data["trials"] is None
    assert {case["chosen"] for case in data["cases"]} == {"toy_exact"}
    assert len(data["cases"]) == 6
    text = run("doctor").stdout
    assert "Nothing is wrong." in text
    assert "bfloat16" in text


@pytest.mark.usefixtures("healthy")
def test_doctor_reports_cases_nobody_serves(plugins: Plugins, run: Callable[..., Result]) -> None:
    plugins.add("exact", EXACT)  # no float32
    data = parsed(run("doctor", "--json"), exit_code=1)
    (message,) = problems(data, "error")
    assert message.startswith("nothing serves float32 D=64, float32 D=128: toy_exact: takes")


@pytest.mark.usefixtures("healthy")
def test_a_case_that_a_chosen_backend_does_not_serve_is_a_warning(
    plugins: Plugins, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.add("exact", EXACT)  # no float32
    monkeypatch.setenv("POLYATTN_BACKEND", "toy_exact")
    data = parsed(run("doctor", "--json"))
    (message,) = problems(data, "warning")
    assert message.startswith("nothing serves float32 D=64")


@pytest.mark.usefixtures("healthy")
def test_doctor_reports_broken_plugins_and_probes(
    plugins: Plugins, run: Callable[..., Result]
) -> None:
    plugins.add("full", EXACT.replace('"bfloat16")', '"bfloat16", "float32")'))
    plugins.add("broken", BROKEN)
    probe = "probe_availability=lambda environment: 1 / 0, implementation="
    plugins.add("probe", EXACT.replace("toy", "bad").replace("implementation=", probe))
    messages = problems(parsed(run("doctor", "--json"), exit_code=1), "error")
    assert any("plugin broken of fake-broken 1.0" in message for message in messages)
    assert any("bad_exact" in message and "ZeroDivision" in message for message in messages)
    assert "error: plugin broken of fake-broken 1.0" in run("doctor").stdout


@pytest.mark.usefixtures("healthy")
def test_doctor_reports_an_installation_without_backends(run: Callable[..., Result]) -> None:
    data = parsed(run("doctor", "--json"), exit_code=1)
    assert problems(data, "error") == ["no attention backend is loaded"]


@pytest.mark.usefixtures("plugins_all_types")
@pytest.mark.parametrize(
    ("torch_trial", "words"),
    [
        ({"status": "failed", "message": "crashed with SIGSEGV"}, "crashed with SIGSEGV"),
        ({**TORCH_WORKS, "platform": "cuda", "device": "cuda 9.0"}, "torch 2.11 sees cuda 9.0"),
    ],
)
def test_doctor_reports_a_torch_that_does_not_work(
    run: Callable[..., Result],
    healthy: None,
    monkeypatch: pytest.MonkeyPatch,
    torch_trial: Any,
    words: str,
) -> None:
    monkeypatch.setattr(doctor, "run_trial", lambda *arguments: torch_trial)
    (message,) = problems(parsed(run("doctor", "--json"), exit_code=1), "error")
    assert words in message


@pytest.mark.usefixtures("plugins_all_types")
def test_doctor_reports_a_missing_torch(
    run: Callable[..., Result], healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyattn.environment import Environment

    without = Environment.detect().model_copy(update={"torch": None})
    monkeypatch.setattr(Environment, "detect", classmethod(lambda cls, device=None: without))
    (message,) = problems(parsed(run("doctor", "--json"), exit_code=1), "error")
    assert message.startswith("torch is not installed")


@pytest.mark.usefixtures("healthy")
def test_doctor_reports_versions_that_do_not_go_together(
    plugins_all_types: Plugins, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyattn.environment import Environment

    here = Environment.detect()
    core = here.distributions["polyattn"]
    plugins_all_types.distribution(
        "polyattn-fits", "7", f"polyattn=={core}", "polyattn-x; extra=='x'"
    )
    plugins_all_types.distribution("polyattn-old", "0.0.1", "polyattn<0.0.2", "polyattn-absent>=1")
    distributions = {**here.distributions, "polyattn-old": "0.0.1", "polyattn-fits": "7"}
    machine = here.model_copy(update={"distributions": distributions})
    monkeypatch.setattr(Environment, "detect", classmethod(lambda cls, device=None: machine))
    data = parsed(run("doctor", "--json"), exit_code=1)
    assert problems(data, "error") == [
        f"polyattn-old 0.0.1 goes with polyattn<0.0.2, found {core}",
        "polyattn-old 0.0.1 goes with polyattn-absent>=1, found none",
    ]


@pytest.mark.usefixtures("healthy", "plugins_all_types")
def test_doctor_looks_at_the_variables(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYATTN_BACKND", "toy")
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "toy")
    data = parsed(run("doctor", "--json"))  # warnings alone are no failure
    misspelt, diffusers = sorted(problems(data, "warning"), reverse=True)
    assert "did you mean POLYATTN_BACKEND?" in misspelt
    assert diffusers.startswith("DIFFUSERS_ATTN_BACKEND=toy")
    monkeypatch.setenv("POLYATTN_BACKEND", "unheard_of")
    data = parsed(run("doctor", "--json"), exit_code=1)
    assert any("unheard_of" in message for message in problems(data, "error"))


@pytest.mark.usefixtures("healthy", "plugins_all_types")
def test_doctor_deep_tries_what_is_usable(
    plugins: Plugins, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.add("sparse", SPARSE)
    answers = {
        ("torch",): TORCH_WORKS,
        ("backend", "toy_exact"): {"status": "failed", "message": "crashed with SIGSEGV"},
    }
    monkeypatch.setattr(doctor, "run_trial", lambda *arguments: answers[arguments])
    data = parsed(run("doctor", "--deep", "--json"), exit_code=1)
    assert data["trials"]["toy_sparse"]["status"] == "skipped"
    assert problems(data, "error") == ["toy_exact does not work here: crashed with SIGSEGV"]
    assert "crashed with SIGSEGV" in run("doctor", "--deep").stdout


@pytest.mark.slow  # imports torch twice, each time in a process of its own
@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_trials_tell_right_from_wrong_from_crash(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.add("good", EXACT)
    plugins.add("wrong", EXACT.replace("toy", "wrong").replace("(q, k, v)", "(q, k, v * 1.1)"))
    crash = (
        "import torch\n    import os, sys; print('bye', file=sys.stderr, flush=True); os.abort()"
    )
    plugins.add("crash", EXACT.replace("toy", "crash").replace("import torch", crash))
    plugins.add("import", EXACT.replace("toy", "import").replace("MODULE:build", "nowhere:build"))
    for name, value in plugins.environment(CUDA_VISIBLE_DEVICES="").items():
        monkeypatch.setenv(name, value)
    good = trial.run_trial("backend", "toy_exact")
    assert good["status"] == "ok"
    assert good["relative_error"] < 0.01
    wrong = trial.run_trial("backend", "wrong_exact")
    assert wrong["status"] == "failed"
    assert "wrong numbers" in wrong["message"]
    crashed = trial.run_trial("backend", "crash_exact")
    assert crashed["status"] == "failed"
    assert signal.SIGABRT.name in crashed["message"]
    unloaded = trial.run_trial("backend", "import_exact")
    assert unloaded["status"] == "failed"
    assert "nowhere" in unloaded["message"]
    refused = trial.run_trial("backend", "unheard_of")
    assert refused["status"] == "refused"


def test_a_trial_that_never_ends_is_ended() -> None:
    answer = trial.run_trial("torch", seconds=0.01)
    assert answer["status"] == "failed"
    assert "did not finish" in answer["message"]
