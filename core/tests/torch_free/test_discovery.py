"""A broken plugin is a finding; every other plugin still works."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyattn import discovery
from polyattn.discovery import Finding, Registry
from polyattn.environment import Environment
from polyattn.probing import default_availability_reasons
from polyattn.testing.isolation import fake_distribution

SPEC = """
from polyattn.contract import Architectures, BackendSpec, Capabilities
from polyattn.hooks import hookimpl

def spec(name, **more):
    return BackendSpec(**dict(
        name=name, summary="for tests", kind="exact",
        capabilities=Capabilities(platforms={{"cpu": Architectures()}}, dtypes=("float32",)),
        implementation="nowhere:build", **more))

@hookimpl
def polyattn_backends():
    {body}
"""
_counter = itertools.count()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for variable in ("POLYATTN_PLUGINS", "POLYATTN_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path


def publish(
    folder: Path,
    name: str,
    body: str = "",
    *,
    source: str | None = None,
    value: str | None = None,
    requires: tuple[str, ...] = (),
) -> None:
    module = f"fake_plugin_{next(_counter)}"
    fake_distribution(
        folder,
        f"polyattn-{name}",
        "1.2",
        {name: value or module},
        {module: SPEC.format(body=body) if source is None else source},
        requires,
    )


def found(folder: Path) -> Registry:
    return discovery.discover(discovery.installed_entry_points([str(folder)]))


def only_finding(registry: Registry) -> Finding:
    assert len(registry.findings) == 1, registry.findings
    return registry.findings[0]


def test_a_good_plugin(folder: Path) -> None:
    publish(folder, "good", "return [spec('good', aliases={'g2': {'version': 2}})]")
    registry = found(folder)
    assert list(registry.backends) == ["good"]
    assert registry.aliases == {"g2": ("good", {"version": 2})}
    assert not registry.findings
    assert registry.backends["good"].distribution == "polyattn-good"
    assert registry.backends["good"].version == "1.2"


BROKEN = {
    "import error": ("import does_not_exist_anywhere", "import", "does_not_exist_anywhere"),
    "syntax error": ("def (", "import", "SyntaxError"),
    "exits at import": ("raise SystemExit(3)", "import", "SystemExit"),
    "os error": ("raise OSError('libcuda.so.1: no such file')", "import", "libcuda"),
    "no hook": ("x = 1", "hook", "implements no polyattn hook"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_module_that_breaks(folder: Path, case: str) -> None:
    source, stage, told = BROKEN[case]
    publish(folder, "bad", source=source)
    publish(folder, "good", "return [spec('good')]")
    registry = found(folder)
    finding = only_finding(registry)
    assert (finding.distribution, finding.version, finding.stage) == ("polyattn-bad", "1.2", stage)
    assert told in finding.message
    assert finding.severity == "error"
    assert list(registry.backends) == ["good"]


HOOKS = {
    "raises": ("raise RuntimeError('no luck')", "hook", "no luck"),
    "exits": ("import sys; sys.exit(1)", "hook", "SystemExit"),
    "returns a string": ("return 'fa'", "hook", "must return a list"),
    "returns None": ("return None", "hook", "must return a list"),
    "returns a mapping": ("return {'a': 1}", "hook", "must return a list"),
    "returns other things": ("return [42]", "spec", "returned int"),
    "raises half way": ("yield spec('half'); raise ValueError('late')", "hook", "late"),
    "bad name": ("return [spec('Bad Name')]", "hook", "not a backend name"),
    "bad implementation": (
        "s = spec('x'); return [type(s)(**{**dict(s), 'implementation': 'no colon'})]",
        "hook",
        "module:factory",
    ),
    "newer api": ("return [spec('new', api_version=99)]", "api_version", "upgrade polyattn"),
    "older api": ("return [spec('old', api_version=0)]", "api_version", "upgrade the plugin"),
    "lax config": (
        "from pydantic import create_model as m; return [spec('lax', config=m('C', a=(int, 1)))]",
        "hook",
        "forbid extra keys",
    ),
    "unknown capability": (
        "return [spec('u').model_copy(update="
        "{'capabilities': Capabilities(platforms={}, dtypes=())})]",
        "hook",
        "at least one platform",
    ),
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_that_breaks(folder: Path, case: str) -> None:
    body, stage, told = HOOKS[case]
    publish(folder, "bad", body)
    publish(folder, "good", "return [spec('good')]")
    registry = found(folder)
    finding = only_finding(registry)
    assert finding.stage == stage
    assert told in finding.message
    assert list(registry.backends) == ["good"]


def test_a_wrong_hook_signature(folder: Path) -> None:
    source = (
        "from polyattn.hooks import hookimpl\n@hookimpl\ndef polyattn_backends(surprise): return []"
    )
    publish(folder, "bad", source=source)
    publish(folder, "good", "return [spec('good')]")
    registry = found(folder)
    assert only_finding(registry).stage == "register"
    assert list(registry.backends) == ["good"]


@pytest.mark.parametrize("value", ["no_such_module_at_all", "fake_nothing:missing.attr", "::"])
def test_an_entry_point_that_leads_nowhere(folder: Path, value: str) -> None:
    publish(folder, "bad", "return []", value=value)
    publish(folder, "good", "return [spec('good')]")
    registry = found(folder)
    assert only_finding(registry).stage == "import"
    assert list(registry.backends) == ["good"]


def test_an_entry_point_file_that_cannot_be_parsed(folder: Path) -> None:
    publish(folder, "bad", "return []")
    publish(folder, "unrelated", "return []")
    publish(folder, "good", "return [spec('good')]")
    (text,) = folder.glob("polyattn_bad-*/entry_points.txt")
    text.write_text("[polyattn.backends]\nbad = :: what\n= nothing\n")
    (text,) = folder.glob("polyattn_unrelated-*/entry_points.txt")
    text.write_text("[console_scripts]\n= nothing\n")
    registry = found(folder)
    assert list(registry.backends) == ["good"]
    assert {finding.distribution for finding in registry.findings} <= {"polyattn-bad"}


def test_the_first_of_two_installations_counts(folder: Path, tmp_path: Path) -> None:
    first, second = folder / "first", folder / "second"
    for place, name in ((first, "mine"), (second, "stale")):
        publish(place, "twice", f"return [spec('{name}')]")
    sys.path[:0] = [str(first), str(second)]
    try:
        points = discovery.installed_entry_points([str(first), str(second)])
        assert list(discovery.discover(points).backends) == ["mine"]
    finally:
        del sys.path[:2]


def test_a_plugin_that_prints_is_kept_quiet_and_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(folder, "loud", "print('hello from the kernel'); return [spec('loud')]")
    registry = found(folder)
    finding = only_finding(registry)
    assert finding.severity == "warning"
    assert "hello from the kernel" in finding.message
    assert capsys.readouterr().out == ""
    assert list(registry.backends) == ["loud"]


def test_a_plugin_that_imports_torch_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    publish(
        folder,
        "eager",
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
        "return [spec('eager')]",
    )
    registry = found(folder)
    sys.modules.pop("torch", None)
    finding = only_finding(registry)
    assert "imports torch" in finding.message
    assert finding.severity == "warning"
    assert list(registry.backends) == ["eager"]


def test_unknown_spec_fields_of_a_newer_plugin_are_told(folder: Path) -> None:
    publish(folder, "newer", "return [spec('newer', hologram=True)]")
    registry = found(folder)
    assert "hologram" in only_finding(registry).message
    assert list(registry.backends) == ["newer"]


def test_two_plugins_with_one_name_are_both_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(folder, "one", "return [spec('same'), spec('mine')]")
    publish(folder, "two", "return [spec('same')]")
    publish(folder, "three", "return [spec('three')]")
    registry = found(folder)
    assert sorted(registry.backends) == ["mine", "three"]
    assert {finding.stage for finding in registry.findings} == {"conflict"}
    assert {finding.distribution for finding in registry.findings} == {
        "polyattn-one",
        "polyattn-two",
    }
    assert all("POLYATTN_DISABLE" in finding.message for finding in registry.findings)
    monkeypatch.setenv("POLYATTN_DISABLE", "polyattn-two")
    assert sorted(found(folder).backends) == ["mine", "same", "three"]
    monkeypatch.setenv("POLYATTN_DISABLE", "polyattn-twoo")
    assert any("polyattn-twoo" in finding.message for finding in found(folder).findings)


def test_an_alias_never_takes_a_name(folder: Path) -> None:
    publish(folder, "thief", "return [spec('thief', aliases=['owner', 'shared'])]")
    publish(folder, "owner", "return [spec('owner')]")
    publish(folder, "other", "return [spec('other', aliases=['shared'])]")
    registry = found(folder)
    assert sorted(registry.backends) == ["other", "owner", "thief"]
    assert registry.aliases == {}
    assert {finding.stage for finding in registry.findings} == {"conflict"}


def test_polyattn_plugins_limits_what_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(folder, "a", "return [spec('a')]")
    publish(folder, "b", source="raise RuntimeError('must not be imported')")
    monkeypatch.setenv("POLYATTN_PLUGINS", "a")
    assert list(found(folder).backends) == ["a"]
    assert not found(folder).findings
    monkeypatch.setenv("POLYATTN_PLUGINS", "")
    assert not found(folder).backends
    monkeypatch.setenv("POLYATTN_PLUGINS", "a,ghost")
    assert "ghost" in only_finding(found(folder)).message


def test_version_ranges_come_from_the_metadata(folder: Path) -> None:
    publish(
        folder,
        "kernel",
        "return [spec('kernel')]",
        requires=(
            "polyattn>=0.1",
            "numpy>=1.20",
            'Flash_Attn>=2.6,<3; extra == "kernel"',
            'pytest; extra == "test"',
            'tomli; python_version < "3"',
        ),
    )
    spec = found(folder).backends["kernel"].spec
    assert {each.distribution: each.specifier for each in spec.requirements} == {
        "numpy": ">=1.20",
        "flash-attn": "<3,>=2.6",
    }
    bare = Environment(distributions={"numpy": "1.26"})
    (reason,) = default_availability_reasons(spec, bare)
    assert reason.code == "requirement-missing"
    assert reason.hint == 'pip install "polyattn-kernel[kernel]"'
    old = Environment(distributions={"numpy": "1.26", "flash-attn": "2.3.1"})
    (reason,) = default_availability_reasons(spec, old)
    assert reason.code == "requirement-version"
    assert "2.3.1" in reason.message
    assert "2.6" in reason.message
    fine = Environment(distributions={"numpy": "1.26", "flash-attn": "2.8.3.post1+cu13"})
    assert default_availability_reasons(spec, fine) == []


def test_a_plugin_teaches_a_platform(folder: Path) -> None:
    source = (
        "from polyattn.environment import Accelerator\nfrom polyattn.hooks import hookimpl\n"
        "@hookimpl\ndef polyattn_accelerator():\n"
        "    return Accelerator(platform='tpu', arch='v6', device_name='TPU v6')\n"
    )
    publish(folder, "tpu", source=source)
    registry = found(folder)
    assert not registry.findings
    assert [each.platform for each in registry.accelerators] == ["tpu"]
