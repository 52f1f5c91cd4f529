"""What is special to aiter: releases, limits, broken installations, launches under masks."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import importlib_metadata
import pytest
import torch

import polyattn
from polyattn.contract import Architectures, AttentionRequest, BackendSpec, Capabilities
from polyattn.discovery import registry
from polyattn.environment import Accelerator, Environment
from polyattn.errors import BackendUnavailableError, ConfigError
from polyattn.reporting import Report, reporting_to
from polyattn.testing import default_settings, isolated_registry, oracle
from polyattn_aiter import SPEC
from polyattn_aiter.config import AiterConfig
from polyattn_aiter.probes import availability, reasons_against

RELEASES = ("august_2026", "release_0_1_5", "february_2025")
VIDEO = AttentionRequest(
    batch=1,
    query_length=32760,
    key_length=32760,
    heads=24,
    kv_heads=24,
    head_dim=128,
    dtype="bfloat16",
    device="cuda",
)


@pytest.fixture(autouse=True)
def nobody_configured_anything() -> Any:
    with default_settings():
        yield


def machine(text: str) -> Environment:
    return Environment.assume(f"{text},torch:2.9.0", base=Environment())


def inputs(queries: int = 40, keys: int = 40, head_dim: int = 64, heads: int = 2) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, heads, head_dim), *[(2, keys, heads, head_dim)] * 2)
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)


def aiter(*tensors: torch.Tensor, **arguments: Any) -> Any:
    return polyattn.attention(*tensors, backend="aiter", **arguments)


# --- what is installed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "codes"),
    [
        ("rocm:gfx942,amd-aiter:0.1.9", []),
        ("rocm:gfx942,amd-aiter:0.1.7.post2.dev18,aiter:0.13", []),
        ("rocm:gfx942,amd-aiter:no-version", []),
        ("rocm:gfx942", ["requirement-missing"]),
        ("rocm:gfx942,aiter:0.13", ["namesake", "requirement-missing"]),
        ("cuda:9.0,amd-aiter:0.1.9", ["nvidia"]),
        ("cpu,amd-aiter:0.1.9", ["hip"]),
        ("cpu,aiter:0.13", ["namesake", "requirement-missing", "hip"]),
        ("cuda:9.0,aiter:0.13", ["nvidia", "namesake", "requirement-missing"]),
    ],
)
def test_availability(where: str, codes: list[str]) -> None:
    """With a command where there is an AMD GPU; nothing that is typed makes up for one."""
    reasons = availability(machine(where))
    assert [reason.code for reason in reasons] == codes
    assert all((reason.hint is not None) == where.startswith("rocm") for reason in reasons)


def test_reasons_say_what_was_found() -> None:
    namesake, missing = availability(machine("rocm:gfx942,aiter:0.13"))
    assert "aiter 0.13" in namesake.message
    assert str(namesake.hint).startswith("pip uninstall -y aiter && pip install")
    assert str(missing.hint).startswith("pip install")
    (hip,) = availability(machine("cpu,amd-aiter:0.1.9"))
    assert "found torch 2.9.0 built without a GPU" in hip.message
    (hip,) = availability(machine("cpu,amd-aiter:0.1.9").model_copy(update={"cuda": "12.8"}))
    assert "found torch 2.9.0 built for CUDA 12.8" in hip.message
    amd = Accelerator(platform="rocm", arch="gfx942")
    (hip,) = availability(Environment(accelerator=amd, distributions={"amd-aiter": "0.1.9"}))
    assert "found no torch" in hip.message
    assert hip.hint == "pip install torch --index-url https://download.pytorch.org/whl/rocm6.4"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("cuda:9.0", "needs an AMD GPU with ROCm; this is NVIDIA: cuda 9.0 (assumed)"),
        ("cpu", "needs an AMD GPU with ROCm, found cpu (assumed)"),
        ("mps", "needs an AMD GPU with ROCm, found mps (assumed)"),
    ],
)
def test_a_machine_without_an_amd_gpu_reads_so_first(where: str, words: str) -> None:
    with isolated_registry(SPEC):
        (status,) = polyattn.backends(machine(where))
    assert status.reasons[0].message == words
    assert [reason.hint for reason in status.reasons] == [None] * len(status.reasons)
    assert not any("cuda or rocm" in each.message for each in status.reasons)
    assert not any("CUDA assumed" in each.message for each in status.reasons)


@pytest.mark.parametrize(
    ("where", "usable"),
    [("rocm:gfx942", True), ("rocm:gfx950", True), ("rocm:gfx90a", False), ("cuda:9.0", False)],
)
def test_machines(where: str, usable: bool) -> None:
    with isolated_registry(SPEC):
        (status,) = polyattn.backends(machine(f"{where},amd-aiter:0.1.9"))
    assert status.usable == usable


def test_automatic_choice_prefers_other_exact_backends() -> None:
    other = BackendSpec(
        name="zz_other",
        summary="another",
        kind="exact",
        capabilities=Capabilities(platforms={"rocm": Architectures()}, dtypes=("bfloat16",)),
        implementation="nowhere:build",
    )
    with isolated_registry(SPEC, other):
        here = machine("rocm:gfx942,amd-aiter:0.1.9")
        assert polyattn.select(request=VIDEO, environment=here).chosen == "zz_other"
        assert polyattn.select("aiter", request=VIDEO, environment=here).chosen == "aiter"


def test_the_extra_installs_what_the_spec_requires() -> None:
    asked = importlib_metadata.requires("polyattn-aiter") or []
    extra = [text.partition(";")[0].strip() for text in asked if "extra ==" in text]
    assert extra == [each.distribution + each.specifier for each in SPEC.requirements]


REINSTALL = 'pip uninstall -y aiter amd-aiter && pip install "polyattn-aiter[kernel]"'
BROKEN: dict[str, tuple[str | None, str, str | None]] = {
    "metadata only": (
        "raise ModuleNotFoundError(\"No module named 'aiter'\", name='aiter')",
        "No module named 'aiter'",
        REINSTALL,
    ),
    "a dependency": (
        "import no_such_library.part",
        "No module named 'no_such_library'",
        "pip install no_such_library",
    ),
    "part of a dependency": ("import torch.no_part", "No module named 'torch.no_part'", None),
    "import error": (
        "from aiter.jit import core",
        "ModuleNotFoundError: No module named 'aiter.jit'",
        REINSTALL,
    ),
    "shared library": (
        "import ctypes\nctypes.CDLL('libpolyattn_is_not_there.so.6')",
        "OSError: libpolyattn_is_not_there.so.6: cannot open shared object file",
        None,
    ),
    "exit": ("raise SystemExit('rocminfo not found')", "SystemExit: rocminfo not found", None),
    "another package": ("def aiter(): ...", "has no flash_attn_func", REINSTALL),
    "left-over folder": (None, "is a folder without a package, left behind at", REINSTALL),
    "not a function": ("flash_attn_func = None", "has no flash_attn_func", REINSTALL),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_installations_are_reasons(pretence: Any, case: str) -> None:
    """Each says what was found and what to type, and breaks neither discovery nor a second try."""
    source, found, hint = BROKEN[case]
    with pretence.broken(source):
        for _ in range(2):
            with pytest.raises(BackendUnavailableError) as caught:
                aiter(*inputs())
            message = str(caught.value)
            assert found in message
            assert "amd-aiter 0.1.9" in message
        assert registry().findings == ()
        (status,) = polyattn.backends()
        assert [reason.code for reason in status.reasons] == ["kernel-import-failed"]
        assert found in status.reasons[0].message
        assert status.reasons[0].hint == hint


def test_a_variable_that_leaves_the_function_out_is_named(
    pretence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_TRITON_ONLY", "1")
    with pretence.broken("ops = None"), pytest.raises(BackendUnavailableError) as caught:
        aiter(*inputs())
    assert "AITER_TRITON_ONLY is set" in str(caught.value)
    assert "Try: unset AITER_TRITON_ONLY" in str(caught.value)


def test_a_function_without_a_needed_parameter_is_refused(pretence: Any) -> None:
    with pretence("without_lse"), pytest.raises(BackendUnavailableError) as caught:
        aiter(*inputs())
    assert "takes no return_lse; found the parameters q, k, v, dropout_p" in str(caught.value)


def test_a_log_sum_exp_of_another_layout_is_an_error(pretence: Any) -> None:
    with pretence("with_another_lse"):
        aiter(*inputs())
        with pytest.raises(BackendUnavailableError, match="shape \\(2, 2, 40\\), and returned"):
            aiter(*inputs(), return_lse=True)


# --- what the function is given -------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_only_keywords_and_only_what_is_needed(
    pretence: Any, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    with pretence(release):
        module = importlib.import_module("polyattn_aiter.attention")
        function, given = module.flash_attn_func, []

        def record(*arguments: Any, **named: Any) -> Any:
            given.append((arguments, sorted(named)))
            return function(*arguments, **named)

        record.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "flash_attn_func", record)
        aiter(*inputs(), is_causal=True)
    assert given == [((), ["causal", "k", "q", "return_lse", "softmax_scale", "v"])]


@pytest.mark.parametrize("scale", [-0.3, 0, 0.3])
def test_the_vendor_sees_positive_scales(pretence: Any, scale: float) -> None:
    q, k, v = inputs()
    with pretence("august_2026") as vendor:
        out, lse = aiter(q, k, v, scale=scale, return_lse=True)
        assert vendor.calls[-1]["scale"] == (abs(scale) or 1.0)
    expected, expected_lse = oracle.attention(q, k, v, scale=scale, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [9, 100, 256])
def test_padded_head_dimensions(pretence: Any, head_dim: int) -> None:
    """The vendor cuts its padding off and returns a view; the scale is that of the caller's D."""
    q, k, v = inputs(head_dim=head_dim)
    with pretence("august_2026"):
        out = aiter(q, k, v)
        assert out.is_contiguous() == (head_dim % 8 == 0)
    torch.testing.assert_close(out.double(), oracle.attention(q, k, v), atol=0.02, rtol=0.02)


def test_queries_without_keys_are_not_handed_over(pretence: Any) -> None:
    q, k, v = inputs(queries=77, keys=40)
    with pretence("august_2026") as vendor:
        out, lse = aiter(q, k, v, is_causal=True, return_lse=True)
        assert [each["shapes"][0][1] for each in vendor.calls] == [40]
    assert (out[:, :37] == 0).all()
    assert lse[..., :37].isneginf().all()
    assert lse[..., 37:].isfinite().all()


def test_only_visible_keys_are_handed_over(pretence: Any) -> None:
    """One launch per item, none for an item without keys; one for all where the mask is shared."""
    q, k, v = (torch.cat([each, each[:1]]) for each in inputs(queries=24, keys=40))
    lengths = torch.tensor([40, 13, 0])
    mask = torch.arange(40) < lengths[:, None]
    with pretence("august_2026") as vendor:
        aiter(q, k, v, attn_mask=mask)
        shapes = [each["shapes"] for each in vendor.calls]
        assert [(one[:2], two[:2]) for one, two in shapes] == [
            ((1, 24), (1, 40)),
            ((1, 24), (1, 13)),
        ]
        vendor.calls.clear()
        aiter(q, k, v, attn_mask=mask[1][None, None, None])
        assert [each["shapes"][1][:2] for each in vendor.calls] == [(3, 13)]


@pytest.mark.parametrize(
    ("hidden", "queries", "launches"),
    [
        (slice(30, None), 40, [(30, 30, True), (10, 30, False)]),  # padding at the end
        (slice(None, 10), 40, [(30, 30, True)]),  # and at the start
        (slice(30, None), 24, [(14, 30, True), (10, 30, False)]),
        (slice(None, 10), 60, [(30, 30, True)]),
        (slice(10, 20), 40, [(10, 10, True), (10, 10, False), (20, 30, True)]),
    ],
)
def test_causal_launches_under_padding(
    pretence: Any, hidden: slice, queries: int, launches: list[tuple[int, int, bool]]
) -> None:
    q, k, v = inputs(queries=queries)
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    mask[..., hidden] = False
    with pretence("august_2026") as vendor:
        aiter(q, k, v, attn_mask=mask, is_causal=True)
        seen = [(*(shape[1] for shape in each["shapes"]), each["causal"]) for each in vendor.calls]
    assert seen == launches


@pytest.mark.parametrize("seed", range(12))
def test_any_padding_with_causality_equals_the_oracle(pretence: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (int(each) for each in torch.randint(1, 60, (2,), generator=generator))
    q, k, v = inputs(queries=queries, keys=keys)
    mask = torch.rand(2, 1, 1, keys, generator=generator) < (0.1, 0.5, 0.9)[seed % 3]
    with pretence("august_2026"):
        out, lse = aiter(q, k, v, attn_mask=mask, is_causal=True, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask=mask, is_causal=True, return_lse=True)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


def test_the_tensors_device_is_current_while_the_vendor_runs(
    pretence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are launched on the current device, wherever the tensors lie."""
    entered = []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    with pretence("august_2026") as vendor:
        module = importlib.import_module("polyattn_aiter.attention")
        for where, expected in (("cpu", []), ("cuda:0", []), ("cuda:1", [torch.device("cuda:1")])):
            with module._current(torch.device(where)):
                assert entered == expected
        made = []
        monkeypatch.setattr(module, "_current", lambda where: made.append(where) or device(where))
        aiter(*inputs())
        assert made == [torch.device("cpu")]
        assert len(vendor.calls) == 1


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"key_length": 699_050}, []),  # 3.9999 GiB
        ({"key_length": 699_051}, ["extent"]),
        ({"query_length": 699_051}, ["extent"]),
        ({"query_length": 699_051, "key_length": 699_051, "kv_heads": 1}, ["extent"]),
        ({"key_length": 699_051, "kv_heads": 8}, []),
        ({"key_length": 699_050, "head_dim": 129}, ["extent"]),  # padded to 136
        ({"key_length": 699_051, "head_dim": None}, []),
    ],
)
def test_items_of_four_gibibytes_are_refused(changes: Any, codes: list[str]) -> None:
    reasons = reasons_against(replace(VIDEO, **changes), AiterConfig(), machine("rocm:gfx942"))
    assert [reason.code for reason in reasons] == codes


def test_views_beyond_32_bits_are_copied(pretence: Any) -> None:
    """Tensors without memory: only their strides matter."""
    with pretence("august_2026"):
        addressable = importlib.import_module("polyattn_aiter.attention")._addressable
        packed = torch.empty(1, 300_000, 3, 24, 128, dtype=torch.bfloat16, device="meta")
        view = packed[:, :, 1]  # 1.7 GiB, spread over 5.1
        assert addressable(view).is_contiguous()
        assert addressable(view[:, :200_000]).stride() == view.stride()
        two = torch.empty(2, 300_000, 3, 24, 128, dtype=torch.bfloat16, device="meta")[:, :90, 0]
        assert addressable(two).is_contiguous()  # the second item starts beyond 4 GiB
        assert addressable(two[:1]).stride() == two.stride()


def test_every_tensor_is_made_addressable(pretence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.stack(inputs(), dim=2).unbind(2)
    with pretence("august_2026") as vendor:
        module = importlib.import_module("polyattn_aiter.attention")
        for limit, contiguous in ((1 << 32, False), (1 << 10, True)):
            monkeypatch.setattr(module, "ADDRESSABLE_BYTES", limit)
            aiter(q, k, v)
            assert vendor.calls[-1]["contiguous"] == [contiguous] * 3


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("rocm:gfx942", {}, []),
        ("rocm:gfx942", {"is_causal": True}, []),
        ("rocm:gfx942", {"mask": "key_padding"}, []),
        ("rocm:gfx942", {"head_dim": None, "dtype": None, "query_length": None}, []),
        ("rocm:gfx950", {}, ["gfx942, found rocm gfx950"]),
        ("rocm:gfx942", {"dtype": "float16"}, ["bfloat16, found float16"]),
        ("rocm:gfx942", {"head_dim": 64}, ["a head dimension of 128, found 64"]),
        ("rocm:gfx942", {"query_length": 128}, ["more than 128 queries"]),
        ("rocm:gfx942", {"query_length": 129, "key_length": 20}, []),
        ("rocm:gfx942", {"key_length": 20, "is_causal": True}, ["more than 128 queries"]),
        ("rocm:gfx942", {"is_causal": True, "mask": "key_padding"}, ["in one launch"]),
        ("rocm:gfx950", {"dtype": "float16", "head_dim": 64}, ["gfx942", "bfloat16", "128"]),
    ],
)
def test_a_rounding_that_would_be_ignored_is_refused(
    where: str, changes: Any, words: list[str]
) -> None:
    request = replace(VIDEO, **changes)
    reasons = reasons_against(request, AiterConfig(bf16_rounding="truncate"), machine(where))
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert reason.message.startswith("bf16_rounding=truncate is for ")
        assert word in reason.message
        assert reason.hint is None
    assert reasons_against(request, AiterConfig(), machine(where)) == []


@pytest.mark.parametrize(
    ("rounding", "number"), [("nearest_even", 0), ("nearest_away", 1), ("truncate", 2), (None, 1)]
)
def test_the_rounding_reaches_the_vendor_and_the_report(
    pretence: Any, rounding: str | None, number: int
) -> None:
    config = {"bf16_rounding": rounding} if rounding else None
    with pretence("august_2026") as vendor:
        with reporting_to(Report()) as report:
            aiter(*inputs(200, 200, head_dim=128, heads=1), config=config)
        assert [each["rounding"] for each in vendor.calls] == [number]
    named = rounding or "nearest_away (the vendor's default)"
    assert report.rows[0].facts == {"kernel": "aiter.flash_attn_func", "bf16_rounding": named}


def test_nothing_is_said_of_a_rounding_where_none_is_chosen(pretence: Any) -> None:
    for release, arch in (("august_2026", "gfx950"), ("release_0_1_5", "gfx942")):
        with pretence(release, arch), reporting_to(Report()) as report:
            aiter(*inputs(200, 200, head_dim=128, heads=1))
        assert report.rows[0].facts == {"kernel": "aiter.flash_attn_func"}


def test_a_rounding_the_installed_function_does_not_take_is_refused(
    pretence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(200, 200, head_dim=128, heads=1)
    config = {"bf16_rounding": "truncate"}
    with pretence("release_0_1_5"), pytest.raises(BackendUnavailableError) as caught:
        aiter(*tensors, config=config)
    assert "takes no how_v3_bf16_cvt" in str(caught.value)
    assert "Try:" not in str(caught.value)
    with pretence("august_2026") as vendor:
        monkeypatch.setattr(vendor, "ENABLE_CK", 0, raising=False)
        with pytest.raises(BackendUnavailableError, match="runs Triton kernels only"):
            aiter(*tensors, config=config)
        aiter(*tensors)
    with pytest.raises(ConfigError, match="bf16_rounding"):
        polyattn.select("aiter", request=VIDEO, config="bf16_rounding=up")
