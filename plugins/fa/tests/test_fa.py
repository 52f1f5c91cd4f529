"""What is special to fa: which generation runs where, what broken installations lead to."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fa_stand_ins
import pytest
import torch
from fa_stand_ins import machine, pretending
from torch.utils._python_dispatch import TorchDispatchMode

import polyattn
import polyattn.selection
from polyattn.contract import (
    Architectures,
    AttentionCall,
    AttentionRequest,
    BackendSpec,
    Capabilities,
)
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError, ConfigError, KernelError
from polyattn.reporting import Report, reporting_to
from polyattn.testing import default_settings, isolated_registry, oracle
from polyattn_fa import SPEC, attention, loading
from polyattn_fa.config import FaConfig
from polyattn_fa.generations import (
    MEASURED_9_0,
    ORDER,
    PACKAGES,
    availability_reasons,
    candidates,
    order_of_generations,
    request_reasons,
)

VIDEO = AttentionRequest(
    batch=1,
    query_length=32760,
    key_length=32760,
    heads=8,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    device="cuda",
)
FA4 = "flash-attn-4:4.0.0b36,nvidia-cutlass-dsl:4.8.1"
ALL = f"flash-attn:2.8.3,flash-attn-3:3.0.0b1,fa3-fwd:0.0.3,{FA4}"


@pytest.fixture(autouse=True)
def nobody_configured_anything() -> Iterator[None]:
    with default_settings():
        yield


def first(where: str, version: int | None = None, **changes: Any) -> str | None:
    """The distribution that would serve, or None."""
    found = candidates(replace(VIDEO, **changes), FaConfig(version=version), machine(where))
    return next((each.package.distribution for each in found if not each.reasons), None)


def inputs(
    queries: int = 77, keys: int = 77, batch: int = 2, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, 4, 64) for length in (queries, keys, keys)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def facts(report: Report) -> dict[str, Any]:
    (row,) = report.rows
    assert row.used == "fa"
    return row.facts


def close(out: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "changes", "expected"),
    [
        (f"cuda:8.0,{ALL}", {}, "flash-attn"),
        (f"cuda:8.9,{ALL}", {}, "flash-attn"),
        (f"cuda:9.0,{ALL}", {}, "flash-attn-3"),
        (f"cuda:9.0,fa3-fwd:0.0.3,{FA4}", {}, "fa3-fwd"),
        (f"cuda:9.0,fa3-fwd:0.0.3,{FA4}", {"dtype": "float16"}, "flash-attn-4"),
        (f"cuda:9.0,fa3-fwd:0.0.3,{FA4}", {"head_dim": 256}, "fa3-fwd"),
        (f"cuda:9.0,{FA4},flash-attn:2.8.3", {}, "flash-attn-4"),
        ("cuda:9.0,flash-attn:2.8.3", {}, "flash-attn"),
        (f"cuda:10.0,{ALL}", {}, "flash-attn-4"),
        (f"cuda:10.0,{ALL}", {"head_dim": 192}, "flash-attn"),
        (f"cuda:10.0,{ALL}", {"head_dim": 256}, "flash-attn-4"),
        (f"cuda:11.0,{ALL}", {}, "flash-attn-4"),
        (f"cuda:12.0,{ALL}", {}, "flash-attn-4"),
        (f"cuda:12.0,{ALL}", {"head_dim": 136}, "flash-attn"),
        ("cuda:10.0,fa3-fwd:0.0.3", {}, None),
        (f"cuda:7.5,{ALL}", {}, None),
        (f"cuda:13.0,{ALL}", {}, None),
        (f"rocm:gfx942,{ALL}", {}, "flash-attn"),
        (f"rocm:gfx942,{FA4}", {}, None),
        (f"cuda:9.0,{ALL}", {"head_dim": 100}, None),
        (f"cuda:9.0,{ALL}", {"is_causal": True, "mask": "key_padding"}, "flash-attn-3"),
        (f"cuda:9.0,{ALL}", {"head_dim": 256, "mask": "key_padding"}, "flash-attn-3"),
        (
            f"cuda:9.0,{ALL}",
            {"head_dim": 256, "is_causal": True, "mask": "key_padding"},
            None,
        ),
        (f"cuda:9.0,{ALL}", {"is_causal": True, "mask": "key_padding", "scale": 1e-9}, None),
        (
            f"cuda:9.0,{ALL}",
            {"is_causal": True, "mask": "key_padding", "scale": 0.0},
            "flash-attn-3",
        ),
        (f"cuda:9.0,{ALL}", {"head_dim": None, "dtype": None}, "flash-attn-3"),
    ],
)  # fmt: skip
def test_the_generation_that_fits(where: str, changes: Any, expected: str | None) -> None:
    assert first(where, **changes) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [(2, "flash-attn"), (3, "flash-attn-3"), (4, "flash-attn-4"), (None, "flash-attn-3")],
)
def test_version_is_the_preferred_generation(version: int | None, expected: str) -> None:
    assert first(f"cuda:9.0,{ALL}", version) == expected
    assert first(f"rocm:gfx942,{ALL}", version) == "flash-attn"


def test_every_gpu_has_an_order() -> None:
    """Each order holds generations that exist; the measured table ends with a line for all."""
    known = {each.generation for each in PACKAGES}
    for order in (*ORDER.values(), *(each.order for each in MEASURED_9_0)):
        assert len(set(order)) == len(order)
        assert set(order) <= known
    for arch in ("8.0", "8.6", "9.0", "10.3", "11.0", "12.1"):
        assert order_of_generations(AttentionRequest(), machine(f"cuda:{arch}"))
    assert MEASURED_9_0[-1].matches(AttentionRequest())
    unknown = Environment.model_validate({"accelerator": {"platform": "cuda"}})
    assert order_of_generations(AttentionRequest(), unknown)


def test_another_generation_serves_and_the_report_says_why() -> None:
    where = "cuda:9.0,fa3-fwd:0.0.3"
    with pretending(where, fa_stand_ins.fa3_fwd()), reporting_to(Report()) as report:
        q, k, v = inputs()
        close(polyattn.attention(q, k, v, backend="fa4"), oracle.attention(q, k, v))
        found = facts(report)
    assert (found["generation"], found["package"]) == (3, "fa3-fwd 0.0.3")
    assert found["passed_over"] == "FlashAttention 4: flash-attn-4 is not installed"
    assert found["kernel"] == "dense"


def test_the_preferred_generation_passes_nobody_over() -> None:
    where = f"cuda:9.0,fa3-fwd:0.0.3,{FA4}"
    modules = (fa_stand_ins.fa3_fwd(), fa_stand_ins.flash_attn_4())
    for version, generation in ((None, 3), (3, 3), (4, 4)):
        with pretending(where, *modules), reporting_to(Report()) as report:
            polyattn.attention(*inputs(), backend="fa", config={"version": version})
            found = facts(report)
        assert found["generation"] == generation
        assert "passed_over" not in found


def test_a_strict_version_does_not_fall_back_when_nothing_is_installed() -> None:
    request = replace(VIDEO, device="cpu")
    with pretending("cuda:9.0", beside=(plain_backend("torch_sdpa"),)):
        assert polyattn.select("fa3", request=request).chosen == "torch_sdpa"
        with pytest.raises(BackendUnavailableError, match="FlashAttention 3 and nothing else"):
            polyattn.select("fa3", request=request, config="strict_version=true")


def test_the_measured_order_of_generations() -> None:
    def order(head_dim: int, length: int) -> tuple[int, ...]:
        changed = replace(VIDEO, head_dim=head_dim, query_length=length, key_length=length)
        return order_of_generations(changed, machine("cuda:9.0"))

    assert order(128, 75_600) == order(64, 8_191) == order(96, 75_600) == (3, 4, 2)
    assert order(64, 8_192) == order(64, 75_600) == (4, 3, 2)


def test_strict_version_is_an_error() -> None:
    with pretending("cuda:9.0,fa3-fwd:0.0.3", fa_stand_ins.fa3_fwd()):
        q, k, v = inputs()
        with pytest.raises(BackendUnavailableError) as caught:
            polyattn.attention(q, k, v, backend="fa4", config="strict_version=true")
        assert "FlashAttention 4 (flash-attn-4): flash-attn-4 is not installed" in str(caught.value)
        assert "flash-attn-4>=" in str(caught.value.hint)
        half = [each.half() for each in (q, k, v)]
        with pytest.raises(BackendUnavailableError, match="takes bfloat16, found float16"):
            polyattn.attention(*half, backend="fa", config="version=3,strict_version=true")
        with pytest.raises(ConfigError, match="needs a version to be strict about"):
            polyattn.attention(q, k, v, backend="fa", config="strict_version=true")
        with pytest.raises(ConfigError, match="version"):
            polyattn.attention(q, k, v, backend="fa", config="version=5")
        out = polyattn.attention(q, k, v, backend="fa", config="version=auto")
        close(out, oracle.attention(q, k, v))


# --- what is installed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "codes", "words"),
    [
        ("cuda:9.0", ["requirement-missing"], "needs one of flash-attn-3 (FA3), fa3-fwd (FA3)"),
        ("cuda:9.0,fa3-fwd:0.0.3", [], ""),
        ("cuda:9.0,flash-attn-3:3.0.0b1", [], ""),
        ("cuda:8.0,flash-attn:2.8.3.post2", [], ""),
        ("cuda:9.0,flash-attn:1.0.9", ["requirement-version"], "found flash-attn 1.0.9"),
        ("cuda:9.0,flash-attn:what", ["requirement-version"], "found flash-attn what"),
        ("cuda:10.0,flash-attn-4:4.0.0b1,nvidia-cutlass-dsl:4.8.1", ["requirement-version"],
         "found flash-attn-4 4.0.0b1"),
        ("cuda:10.0,flash-attn-4:4.0.0b36", ["requirement-missing"], "nvidia-cutlass-dsl"),
        (f"cuda:10.0,{FA4}", [], ""),
        ("cuda:9.0,fa3-fwd:0.0.2", ["requirement-version"], "is built for CUDA 12"),
        (f"cuda:9.0,fa3-fwd:0.0.2,{FA4}", [], ""),
        ("cuda:10.0,fa3-fwd:0.0.3", ["requirement-missing"], "needs one of flash-attn-4 (FA4)"),
        (f"rocm:gfx942,{FA4}", ["requirement-missing"], "needs one of flash-attn (FA2)"),
        ("rocm:gfx942,flash-attn:2.8.3", [], ""),
        ("cuda:9.0,fa3-fwd:0.0.3,torch:2.4.0", ["requirement-version"], "found torch 2.4.0"),
        ("cuda:9.0,fa3-fwd:0.0.3,torch:none", ["requirement-missing"], "needs torch>="),
    ],
)  # fmt: skip
def test_any_one_package_is_enough(where: str, codes: list[str], words: str) -> None:
    reasons = availability_reasons(machine(where))
    assert [each.code for each in reasons] == codes
    assert all(words in each.message for each in reasons)
    assert all(each.hint for each in reasons if "torch" not in each.message.split(",")[0])


def test_the_wheel_for_the_other_cuda_is_named() -> None:
    """fa3-fwd links one CUDA runtime, and importing it under the other torch fails."""
    twelve = machine("cuda:9.0,fa3-fwd:0.0.3").model_copy(update={"cuda": "12.8"})
    (reason,) = availability_reasons(twelve)
    assert "is built for CUDA 13" in reason.message
    assert reason.hint == 'pip install "fa3-fwd<0.0.3"'
    (reason,) = availability_reasons(machine("cuda:9.0,fa3-fwd:0.0.1"))
    assert reason.hint == 'pip install "fa3-fwd>=0.0.3"'


def test_where_nothing_is_installed_the_fallback_starts(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is hidden: the reason is in the selection and logged."""
    with pretending("cuda:9.0", beside=(plain_backend("torch_sdpa"),)):
        with caplog.at_level(logging.WARNING, logger="polyattn"):
            selection = polyattn.select("fa3", request=replace(VIDEO, device="cpu"))
    assert selection.chosen == "torch_sdpa"
    assert "the runtime of fa is missing: needs one of flash-attn-3" in selection.why
    assert 'pip install "fa3-fwd>=0.0.3"' in caplog.text


@pytest.mark.parametrize("arch", ["13.0", "7.5"])
@pytest.mark.parametrize("installed", [f",{ALL}", ""])
def test_a_gpu_that_nothing_is_known_about(arch: str, installed: str) -> None:
    """The same answer from the list of backends, from selection and from a call."""
    where = f"cuda:{arch}{installed}"
    words = f"cuda compute capabilities 8.0 to 12.x, found cuda {arch}"
    request = replace(VIDEO, device="cpu")
    for config in ({}, {"version": 4}, {"version": 4, "strict_version": True}):
        (reason,) = request_reasons(VIDEO, FaConfig.model_validate(config), machine(where))
        assert (reason.code, reason.hint) == ("compute-capability", None)
    with isolated_registry(SPEC):
        (status,) = polyattn.backends(machine(where))
        assert not status.usable
        assert words in str(status.reasons[-1])
        with pytest.raises(BackendUnavailableError, match=words):
            polyattn.select("fa", request=VIDEO, environment=machine(where))
    modules = (fa_stand_ins.flash_attn_4(),) if installed else ()
    with pretending(where, *modules, beside=(plain_backend("torch_sdpa"),)):
        assert polyattn.select(request=request).chosen == "torch_sdpa"
        with pytest.raises(BackendUnavailableError, match=words) as caught:
            polyattn.attention(*inputs(), backend="fa")
        assert caught.value.hint == "backend='torch_sdpa'"


@pytest.mark.parametrize(
    ("where", "config", "changes", "hint"),
    [
        ("cuda:9.0", {}, {}, 'pip install "fa3-fwd>=0.0.3"'),
        ("cuda:9.0", {}, {"dtype": "float16"}, 'pip install --pre "flash-attn-4>=4.0.0b36,<5"'),
        ("cuda:9.0", {"version": 4}, {}, 'pip install --pre "flash-attn-4>=4.0.0b36,<5"'),
        ("cuda:9.0", {"version": 4, "strict_version": True}, {},
         'pip install --pre "flash-attn-4>=4.0.0b36,<5"'),
        ("cuda:9.0", {"version": 2, "strict_version": True}, {},
         'pip install --no-build-isolation "flash-attn>=2.6,<3"'),
        ("cuda:9.0", {"version": 3, "strict_version": True}, {}, 'pip install "fa3-fwd>=0.0.3"'),
        ("cuda:10.0", {"version": 3, "strict_version": True}, {}, "config='strict_version=false'"),
        ("cuda:10.0", {"version": 3}, {}, 'pip install --pre "flash-attn-4>=4.0.0b36,<5"'),
        ("rocm:gfx942", {}, {}, 'pip install --no-build-isolation "flash-attn>=2.6,<3"'),
        ("cuda:8.0,flash-attn:1.0.9", {}, {},
         'pip install --no-build-isolation "flash-attn>=2.6,<3"'),
    ],
)  # fmt: skip
def test_the_command_installs_what_the_request_needs(
    where: str, config: Any, changes: Any, hint: str
) -> None:
    """What the request adds comes after what the machine lacks, so the last hint counts."""
    reasons = [
        *availability_reasons(machine(where)),
        *request_reasons(
            replace(VIDEO, **changes), FaConfig.model_validate(config), machine(where)
        ),
    ]
    assert reasons[-1].hint == hint
    # The fallback of `fa` starts where nothing but requirements is missing.
    others = {each.code for each in reasons} - {"requirement-missing", "requirement-version"}
    assert others == ({"strict"} if config.get("strict_version") else set())


def test_where_the_generation_cannot_run_it_is_not_to_be_installed() -> None:
    """Neither with nothing installed nor beside another generation."""
    strict = FaConfig(version=3, strict_version=True)
    for installed in ("", f",{FA4}"):
        reasons = request_reasons(VIDEO, strict, machine(f"cuda:10.0{installed}"))
        for each in reasons:
            assert "needs cuda compute capability 8.x or 9.0, found cuda 10.0" in each.message
            assert "pip" not in str(each.hint)


def test_the_wheel_for_cuda_12_where_nothing_is_installed() -> None:
    twelve = machine("cuda:9.0").model_copy(update={"cuda": "12.8"})
    (reason,) = availability_reasons(twelve)
    assert reason.hint == 'pip install "fa3-fwd<0.0.3"'


def test_bfloat16_is_offered_first() -> None:
    """In trials and hints: every generation takes it."""
    assert SPEC.capabilities.dtypes[0] == "bfloat16"
    assert all("bfloat16" in each.dtypes for each in PACKAGES)


def test_one_that_is_installed_and_unfit_does_not_start_the_fallback() -> None:
    """A head dimension nobody takes is an error with the limits, not another backend."""
    reasons = request_reasons(
        replace(VIDEO, head_dim=192), FaConfig(version=4), machine(f"cuda:10.0,{FA4}")
    )
    assert [each.code for each in reasons] == ["head-dim"]
    assert "FlashAttention 4 (flash-attn-4): takes head dimensions up to 128" in str(reasons[0])
    strict = FaConfig(version=2, strict_version=True)
    (reason,) = request_reasons(VIDEO, strict, machine(f"cuda:9.0,{FA4}"))
    assert (reason.code, reason.message) == (
        "generation",
        "FlashAttention 2 (flash-attn): flash-attn is not installed",
    )


def plain_backend(name: str = "plain") -> BackendSpec:
    """An exact backend that serves where fa does not."""
    return BackendSpec(
        name=name,
        summary="Exact attention for these tests",
        kind="exact",
        capabilities=Capabilities(
            platforms={"cpu": Architectures()}, dtypes=("float16", "bfloat16", "float32")
        ),
        implementation="test_fa:build_plain",
    )


def build_plain(*_: Any) -> Any:
    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Any) -> torch.Tensor:
        result = oracle.attention(q, k, v, scale=call.scale)
        assert isinstance(result, torch.Tensor)
        return result.to(q.dtype)

    return plain


# --- installations that only an import shows to be broken -----------------------------------------

INTERFACE = "def flash_attn_func(q, k, v): ...\ndef flash_attn_varlen_func(q, k, v): ...\n"
BROKEN = {
    "import error": ("raise ImportError('no module named _C')", "no module named _C"),
    "missing library": (
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "OSError: libcudart.so.12: cannot open shared object file",
    ),
    "other torch": (
        "raise ImportError('_C.so: undefined symbol: _ZN3c105ErrorC2E')",
        "undefined symbol: _ZN3c105ErrorC2E",
    ),
    "missing dependency": ("import nowhere.at_all", "nowhere"),
    "no compiled kernels": ("import flash_attn_2_cuda", "flash_attn_2_cuda"),
    "exit": ("raise SystemExit('unsupported machine')", "SystemExit: unsupported machine"),
    "crash": ("1 / 0", "ZeroDivisionError"),
    "other distribution": (INTERFACE, "flash_attn_func takes no softmax_scale, causal"),
    "empty": ("", "has no flash_attn_func"),
}


@pytest.mark.parametrize("kind", [*BROKEN, "left by an uninstall"])
@pytest.mark.parametrize("package", PACKAGES, ids=lambda each: each.distribution)
def test_a_broken_package_is_a_reason(
    package: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told what was found and what to type, and remembered for the probes."""
    where = f"cuda:9.0,{package.distribution}:4.0.0b36,nvidia-cutlass-dsl:4.8.1"
    if package.distribution == "fa3-fwd":
        where = "cuda:9.0,fa3-fwd:0.0.3"
    elif package.generation == 2:
        where = "cuda:9.0,flash-attn:2.8.3"
    if kind not in BROKEN and Environment.detect().version_of(package.distribution):
        pytest.skip("a namespace is not found where the real package is installed as well")
    source, words = BROKEN.get(kind, (None, "has no flash_attn_func"))
    folder = tmp_path.joinpath(*package.module.split("."))
    folder.mkdir(parents=True)
    if source is not None:
        (folder / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pretending(where) as pretended:
        version = str(pretended.version_of(package.distribution))
        reason = loading.load(package, version)
        assert not isinstance(reason, loading.Kernels)
        assert reason.code == "kernel-import-failed"
        assert f"{package.distribution} {version} is installed but" in reason.message
        assert words in reason.message
        if kind == "missing dependency":
            assert reason.hint == "pip install --upgrade nowhere"
        else:
            assert str(reason.hint).startswith("pip install --force-reinstall")
        assert loading.load(package, version) is reason
        assert availability_reasons(pretended) == [reason]
        assert {each.name for each in polyattn.backends()} == {"fa"}
        with pytest.raises(BackendUnavailableError, match="does not load"):
            polyattn.attention(*inputs(), backend="fa")


def test_the_next_generation_serves_where_one_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fa3_fwd_interface.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(str(tmp_path))
    where = f"cuda:9.0,fa3-fwd:0.0.3,{FA4}"
    with pretending(where, fa_stand_ins.flash_attn_4()), reporting_to(Report()) as report:
        q, k, v = inputs()
        close(polyattn.attention(q, k, v), oracle.attention(q, k, v))
        found = facts(report)
    assert found["generation"] == 4
    assert "FlashAttention 3: flash-attn-3 is not installed, fa3-fwd 0.0.3" in found["passed_over"]
    assert "undefined symbol: x" in found["passed_over"]


def test_automatic_selection_goes_on_where_nothing_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The implementation's module fails to import, which selection takes for a reason."""
    (tmp_path / "fa3_fwd_interface.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pretending("cuda:9.0,fa3-fwd:0.0.3", beside=(plain_backend(),)) as pretended:
        monkeypatch.setattr(polyattn.selection, "local_environment", lambda *_: pretended)
        with pytest.raises(BackendUnavailableError, match="undefined symbol: x"):
            import_afresh("polyattn_fa.attention", monkeypatch)
        monkeypatch.undo()
        # From now on the probes know, too.
        with reporting_to(Report()) as report:
            polyattn.attention(*inputs())
        assert report.rows[0].used == "plain"
        with pytest.raises(BackendUnavailableError, match="undefined symbol: x"):
            polyattn.attention(*inputs(), backend="fa")


def import_afresh(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delitem(sys.modules, name)
    return __import__(name, fromlist=["build"])


def test_a_missing_module_is_installed_by_the_name_of_its_distribution() -> None:
    for name, expected in (("cutlass.cute", "nvidia-cutlass-dsl"), ("einops", "einops")):
        hint = loading._repair(PACKAGES[0], ModuleNotFoundError("no", name=name))
        assert hint == f"pip install --upgrade {expected}"
    hint = loading._repair(PACKAGES[0], ModuleNotFoundError("no", name="torch.of_tomorrow"))
    assert "flash-attn-4" in hint


@pytest.mark.parametrize(
    ("distribution", "version", "files", "words"),
    [
        ("fa3-fwd", "0.0.3", [], "there is no module fa3_fwd_interface"),
        ("fa3-fwd", "0.0.3", ["fa3_fwd_interface.py"], None),
        ("flash-attn", "2.8.3", ["flash_attn/left.txt"], "there is no __init__.py in"),
        ("flash-attn", "2.8.3", ["flash_attn/__init__.py"], None),
        ("flash-attn-4", "4.0.0b36", ["flash_attn/__init__.py"], "there is no cute/__init__.py in"),
        ("flash-attn-4", "4.0.0b36", ["flash_attn/cute/__init__.py"], None),
        ("flash-attn-4", "4.0.0b36", [], "there is no module flash_attn"),
    ],
)
def test_metadata_without_the_module(
    distribution: str, version: str, files: list[str], words: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Seen before anything is imported, where the environment is this machine's."""
    if Environment.detect().version_of(distribution):
        pytest.skip("the real package is installed here")
    where = f"cuda:9.0,{distribution}:{version},nvidia-cutlass-dsl:4.8.1"
    with fa_stand_ins.clean_loading():
        assert availability_reasons(machine(where)) == []  # a machine that is not here
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
        for each in (metadata, *(tmp_path / file for file in files)):
            each.parent.mkdir(parents=True, exist_ok=True)
            each.touch()
        metadata.write_text(f"Name: {distribution}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        reasons = availability_reasons(machine(where))
        assert not set(sys.modules) & set(fa_stand_ins.VENDORS)
        with pretending(where):
            (status,) = polyattn.backends()
            assert status.usable is (words is None)
    if words is None:
        assert reasons == []
    else:
        (reason,) = reasons
        assert reason.code == "installation-broken"
        assert words in reason.message
        assert str(reason.hint).startswith("pip install --force-reinstall --no-deps")


def test_listing_survives_a_folder_left_by_an_uninstall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``find_spec("flash_attn")`` finds it; the metadata do not, and they are what counts."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pretending("cuda:9.0") as pretended:
        (reason,) = availability_reasons(pretended)
        assert reason.code == "requirement-missing"


# --- builds that differ ---------------------------------------------------------------------------


@pytest.mark.parametrize("returns_lse", [True, False])
def test_old_builds_of_fa3(returns_lse: bool) -> None:
    """Either always (out, lse), or never: then only a call that needs the log-sum-exp fails."""
    modules = fa_stand_ins.old_flash_attn_3(returns_lse=returns_lse)
    with pretending("cuda:9.0,flash-attn-3:3.0.0b1", modules):
        q, k, v = inputs()
        expected, expected_lse = oracle.attention(q, k, v, return_lse=True)
        close(polyattn.attention(q, k, v, backend="fa"), expected)
        mask = torch.ones(2, 77, dtype=torch.bool)
        close(polyattn.attention(q, k, v, backend="fa", attn_mask=mask), expected)
        if returns_lse:
            out, lse = polyattn.attention(q, k, v, backend="fa", return_lse=True)
            close(out, expected)
            close(lse, expected_lse)
        else:
            with pytest.raises(BackendUnavailableError, match="returns no log-sum-exp"):
                polyattn.attention(q, k, v, backend="fa", return_lse=True)


@pytest.mark.parametrize(
    ("disabled", "where", "changes", "words"),
    [
        (["FP16"], "cuda:9.0", {"dtype": "float16"}, "without float16"),
        (["FP16"], "cuda:9.0", {}, None),
        (["VARLEN"], "cuda:9.0", {"mask": "key_padding"}, "without variable lengths"),
        (["VARLEN"], "cuda:9.0", {"mask": "key_padding", "is_causal": True}, None),
        (["HDIM192", "HDIM256"], "cuda:9.0", {"head_dim": 136}, "above 128, found 136"),
        (
            ["HDIM192", "HDIM256"],
            "cuda:9.0",
            {"head_dim": 128, "is_causal": True, "mask": "key_padding"},
            r"above 128, found 128 \(causal with a mask runs at 136\)",
        ),
        (["HDIM192", "HDIM256"], "cuda:9.0", {"mask": "key_padding"}, None),
        (["HDIM64"], "cuda:9.0", {"head_dim": 64}, None),
        (["SM8x"], "cuda:8.0", {}, "without compute capability 8.x"),
        ([], "cuda:8.0", {}, None),
    ],
)
def test_what_fa3_was_built_without(
    disabled: list[str], where: str, changes: Any, words: str | None
) -> None:
    """The build's own flags are read when it is loaded."""
    text = f"{where},flash-attn-3:3.0.0b1"
    modules = fa_stand_ins.flash_attn_3("flash_attn_interface", *disabled)
    with pretending(text, modules) as pretended:
        request = replace(VIDEO, **changes)
        if words is None:
            built = attention.build(FaConfig(), request, pretended)
            assert isinstance(built, attention.FlashAttention)
        else:
            with pytest.raises(BackendUnavailableError, match=words):
                attention.build(FaConfig(), request, pretended)


# --- calls ----------------------------------------------------------------------------------------

ONE_OF_EACH = {
    2: ("cuda:8.0,flash-attn:2.8.3", fa_stand_ins.flash_attn_2),
    3: ("cuda:9.0,fa3-fwd:0.0.3", fa_stand_ins.fa3_fwd),
    4: (f"cuda:9.0,{FA4}", fa_stand_ins.flash_attn_4),
}
EACH = pytest.mark.parametrize(("where", "modules"), ONE_OF_EACH.values(), ids=ONE_OF_EACH)


@EACH
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [77, 40, 120])
def test_holes_in_a_mask(where: str, modules: Any, is_causal: bool, keys: int) -> None:
    """Any keys may be hidden, not just the last; NaN there reaches nothing; empty items too."""
    q, k, v = inputs(keys=keys, batch=4)
    mask = torch.rand(4, keys, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[1], mask[2], mask[3, :9] = False, True, False
    hidden = ~mask[:, :, None, None]
    expected, expected_lse = oracle.attention(
        q, k, v, mask=mask[:, None, None], is_causal=is_causal, return_lse=True
    )
    k, v = (each.masked_fill(hidden, float("nan")) for each in (k, v))
    with pretending(where, modules()), reporting_to(Report()) as report:
        for scale_of_nothing in (None, 0.0):
            out, lse = polyattn.attention(
                q, k, v, backend="fa", attn_mask=mask, is_causal=is_causal, return_lse=True,
                scale=scale_of_nothing,
            )  # fmt: skip
            assert out.isfinite().all()
            assert (out[1] == 0).all()
            assert torch.equal(lse.isneginf(), expected_lse.isneginf())
            if scale_of_nothing is None:
                close(out, expected)
                seen = expected_lse.isfinite()
                close(lse[seen], expected_lse[seen])
        kernel = {False: "varlen, keys packed", True: "dense, mask as a channel"}[is_causal]
        assert report.rows[0].facts["kernel"] == kernel


@EACH
def test_a_mask_that_hides_everything(where: str, modules: Any) -> None:
    q, k, v = inputs()
    k, v = k.fill_(float("nan")), v.fill_(float("nan"))
    mask = torch.zeros(2, 77, dtype=torch.bool)
    with pretending(where, modules()):
        for is_causal in (False, True):
            out, lse = polyattn.attention(
                q, k, v, backend="fa", attn_mask=mask, is_causal=is_causal, return_lse=True
            )
            assert (out == 0).all()
            assert lse.isneginf().all()


@EACH
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_large_negative_scale(where: str, modules: Any, is_causal: bool) -> None:
    """Kernels find the maximum before they scale: left to them, exp would overflow."""
    q, k, v = inputs()
    expected = oracle.attention(q * 10, k, v, scale=-1.0, is_causal=is_causal)
    with pretending(where, modules()):
        out = polyattn.attention(q * 10, k, v, backend="fa", scale=-1.0, is_causal=is_causal)
        close(out, expected)
        mask = torch.ones(2, 77, dtype=torch.bool)
        masked = polyattn.attention(
            q * 10, k, v, backend="fa", scale=-1.0, is_causal=is_causal, attn_mask=mask
        )
        close(masked, expected)


@EACH
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_mask_does_not_wait_for_the_gpu(where: str, modules: Any, is_causal: bool) -> None:
    """What a call does itself never asks for a value or a count, so a CUDA graph can hold it."""
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with pretending(where, modules()):
        q, k, v = inputs()
        mask = torch.rand(2, 77, generator=torch.Generator().manual_seed(2)) < 0.5
        request = replace(
            VIDEO, batch=2, query_length=77, key_length=77, heads=4, kv_heads=4, head_dim=64,
            mask="key_padding", is_causal=is_causal,
        )  # fmt: skip
        built = attention.build(FaConfig(), request, machine(where))
        assert isinstance(built, attention.FlashAttention)

        def vendor(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return q.clone()

        built.dense = vendor
        built.kernels = replace(built.kernels, dense=vendor, varlen=vendor)
        call = AttentionCall(is_causal, 0.125, mask[:, None, None], "key_padding")
        with Recorder():
            built(q, k, v, call)
    assert seen
    assert not [name for name in seen if any(word in name for word in waiting)]


@EACH
def test_views_are_laid_out_only_where_they_must_be(where: str, modules: Any) -> None:
    """Packed q, k, v reach the kernel as they are; odd steps and expanded tensors as copies."""
    q, k, v = torch.stack(inputs(), dim=2).unbind(2)
    assert all(attention._aligned(each) is each for each in (q, k, v))
    odd = torch.randn(2, 77, 4, 65).bfloat16()[..., :64]
    shifted = torch.randn(2 * 77 * 4 * 64 + 1).bfloat16()[1:].view(2, 77, 4, 64)
    expanded = k[:1].expand_as(k)
    for each in (odd, shifted, expanded, q.transpose(2, 3)):
        copy = attention._aligned(each)
        assert copy is not each
        assert torch.equal(copy, each)
    with pretending(where, modules()):
        for tensor in (odd, shifted, expanded):
            out = polyattn.attention(tensor, k, v, backend="fa")
            close(out, oracle.attention(tensor, k, v))


def test_an_error_of_the_kernel_is_explained() -> None:
    """Backend, generation, version, request, and what else could be tried."""
    modules = fa_stand_ins.fa3_fwd()

    def flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False,
                        return_attn_probs: bool = False) -> Any:  # fmt: skip
        raise RuntimeError("CUDA error: no kernel image is available")

    modules["fa3_fwd_interface"].flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    where = f"cuda:9.0,fa3-fwd:0.0.3,{FA4}"
    with pretending(where, modules, fa_stand_ins.flash_attn_4()):
        with pytest.raises(KernelError) as caught:
            polyattn.attention(*inputs(), backend="fa")
        message = str(caught.value)
        for words in (
            "fa: FlashAttention 3 (fa3-fwd 0.0.3) raised RuntimeError: CUDA error: no kernel image",
            "for B=2 Sq=77 Sk=77 H=4 D=64 bfloat16 on cuda 9.0",
            f"torch {torch.__version__}",
        ):
            assert words in message
        assert message.count("RuntimeError") == 1
        assert "lost its device" not in message
        assert caught.value.hint == "config='version=4'"
        assert isinstance(caught.value.__cause__, RuntimeError)
        out = polyattn.attention(*inputs(), backend="fa", config="version=4")
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: unspecified launch failure", True),
        ("HIP error: device-side assert triggered", True),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", True),
        ("CUDA error: invalid configuration argument", False),
        ("illegal combination of arguments", False),
    ],
)
def test_an_error_that_costs_the_device_says_so(words: str, lost: bool) -> None:
    modules = fa_stand_ins.fa3_fwd()

    def flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False,
                        return_attn_probs: bool = False) -> Any:  # fmt: skip
        raise RuntimeError(words)

    modules["fa3_fwd_interface"].flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    with pretending("cuda:9.0,fa3-fwd:0.0.3", modules):
        with pytest.raises(KernelError) as caught:
            polyattn.attention(*inputs(), backend="fa")
    assert ("this process has lost its device" in str(caught.value)) is lost
    assert caught.value.hint == "backend='torch_sdpa'"


@pytest.mark.parametrize("layout", ["rows first", "square", "padded"])
def test_a_log_sum_exp_of_another_shape(layout: str) -> None:
    """Turned round where it can only be that, taken as documented where square, or refused."""
    modules = fa_stand_ins.flash_attn_2()
    usual = modules["flash_attn"].flash_attn_varlen_func

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        out, lse, _ = usual(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale=softmax_scale, causal=causal, return_attn_probs=True,
        )  # fmt: skip
        if layout == "rows first":
            lse = lse.T.contiguous()
        elif layout == "padded":
            lse = lse.unflatten(1, (2, -1)).transpose(0, 1)
        return out, lse, None

    modules["flash_attn"].flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    q, k, v = inputs(queries=2 if layout == "square" else 77)  # batch 2, 4 heads
    mask = (torch.rand(2, 77, generator=torch.Generator().manual_seed(2)) < 0.5)[:, None, None]
    _, expected = oracle.attention(q, k, v, mask=mask, return_lse=True)
    with pretending("cuda:8.0,flash-attn:2.8.3", modules):
        if layout == "padded":
            with pytest.raises(KernelError, match=r"of \[2, 4, 77\] .* \[4, 154\] is documented"):
                polyattn.attention(q, k, v, backend="fa", attn_mask=mask, return_lse=True)
        else:
            _, lse = polyattn.attention(q, k, v, backend="fa", attn_mask=mask, return_lse=True)
            close(lse, expected)


def test_each_device_gets_its_context_once_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

        def get_device(self) -> int:
            return self.device.index

    given: list[Any] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: given.append(device))
    monkeypatch.setattr(attention, "_thread", type(attention._thread)())
    with pretending("cuda:9.0,fa3-fwd:0.0.3", fa_stand_ins.fa3_fwd()) as pretended:
        built: Any = attention.build(FaConfig(), VIDEO, pretended)
        built._attend = lambda *_: None
        call = AttentionCall(False, 0.125)
        for index in (0, 0, 1, 0, 1):
            tensor = OnGpu(index)
            built(tensor, tensor, tensor, call)
        assert [each.index for each in given] == [0, 1]
        other = threading.Thread(target=lambda: built(tensor, tensor, tensor, call))
        other.start()
        other.join()
        assert [each.index for each in given] == [0, 1, 1]


def test_memory_that_runs_out_stays_what_it_is() -> None:
    modules = fa_stand_ins.fa3_fwd()

    def flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False,
                        return_attn_probs: bool = False) -> Any:  # fmt: skip
        raise torch.OutOfMemoryError("CUDA out of memory")

    modules["fa3_fwd_interface"].flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    with pretending("cuda:9.0,fa3-fwd:0.0.3", modules):
        with pytest.raises(torch.OutOfMemoryError):
            polyattn.attention(*inputs(), backend="fa")


def test_a_first_call_that_takes_long_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per configuration, only when it really takes long, and naming what is compiled."""
    modules = fa_stand_ins.flash_attn_4()
    usual = modules["flash_attn.cute"].flash_attn_func

    def flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False,
                        return_lse: bool = False) -> Any:  # fmt: skip
        time.sleep(0.3)
        return usual(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=return_lse)

    modules["flash_attn.cute"].flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    with pretending(f"cuda:9.0,{FA4}", modules):
        with caplog.at_level(logging.WARNING, logger="polyattn"):
            monkeypatch.setattr(attention, "PATIENCE", 60.0)
            polyattn.attention(*inputs(40), backend="fa")
            assert not caplog.records
            monkeypatch.setattr(attention, "PATIENCE", 0.05)
            for _ in range(2):
                polyattn.attention(*inputs(), backend="fa")
    (record,) = caplog.records
    assert record.getMessage() == (
        "compiling FlashAttention 4 (flash-attn-4 4.0.0b36) for B=2 Sq=77 Sk=77 H=4 D=64 bfloat16: "
        "the first call takes a few seconds"
    )


# --- FA4's disk cache -----------------------------------------------------------------------------

ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@pytest.fixture
def no_cache_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    before = dict(os.environ)
    monkeypatch.delenv(ENABLED, raising=False)
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    for name in (ENABLED, FOLDER):
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in (ENABLED, FOLDER) if name in before})


def test_the_disk_cache_is_in_the_users_folder(no_cache_variables: Path) -> None:
    loading.enable_disk_cache()
    folder = no_cache_variables / "cache" / "polyattn" / "flash-attn-4"
    assert (os.environ[ENABLED], os.environ[FOLDER]) == ("1", str(folder))
    assert folder.is_dir()


@pytest.mark.parametrize("name", [ENABLED, FOLDER])
def test_what_the_user_decided_about_the_cache_stands(
    name: str, no_cache_variables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    loading.enable_disk_cache()
    assert os.environ[name] == "0"
    assert ({ENABLED, FOLDER} - {name}).isdisjoint(os.environ)


def test_a_folder_that_cannot_be_written_leaves_the_cache_off(no_cache_variables: Path) -> None:
    """FA4 would fail to import otherwise."""
    (no_cache_variables / "cache").write_text("a file where the folder would be")
    loading.enable_disk_cache()
    assert {ENABLED, FOLDER}.isdisjoint(os.environ)


def test_only_fa4_touches_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loading, "enable_disk_cache", lambda: asked.append(1))
    for generation, (where, modules) in ONE_OF_EACH.items():
        with pretending(where, modules()):
            polyattn.attention(*inputs(), backend="fa")
        assert len(asked) == (1 if generation == 4 else 0)
