"""What is special to SageAttention: versions, GPUs, the vendor's defects, bad installations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

import polyattn
from polyattn.contract import AttentionRequest
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError, ConfigError, KernelError
from polyattn.probing import availability_reasons, platform_reasons, request_reasons
from polyattn.reporting import Report, reporting_to
from polyattn.testing import default_settings, fake_distribution, oracle
from polyattn.testing.accuracy import measure
from polyattn_sage import SAGE, SAGE_3, kernels
from polyattn_sage.config import SageConfig
from polyattn_sage.kernels import KERNELS, choose

VIDEO = AttentionRequest(
    batch=1,
    query_length=32760,
    key_length=32760,
    heads=12,
    kv_heads=12,
    head_dim=128,
    dtype="bfloat16",
    device="cuda",
)
REINSTALL = 'pip install --force-reinstall --no-deps "sageattention==1.0.6"'
EXTRA = 'pip install "polyattn-sage[kernel]"'
GPUS = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")


def machine(text: str) -> Environment:
    return Environment.assume(f"{text},torch:2.11.0", base=Environment())


def is_installed(distribution: str) -> bool:
    try:
        importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return False
    return True


def codes(reasons: Iterable[Any]) -> list[str]:
    return [each.code for each in reasons]


# --- which kernel runs where ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "config", "expected"),
    [
        ("cuda:9.0,sageattention:1.0.6", {}, (1, "triton", None, None)),
        ("cuda:10.0,sageattention:1.0.6", {}, (1, "triton", None, None)),
        ("cuda:8.0,sageattention:2.2.0", {}, (2, "fp16_cuda", "per_thread", "fp32")),
        ("cuda:8.6,sageattention:2.2.0", {}, (2, "triton", None, None)),
        ("cuda:8.9,sageattention:2.2.0", {}, (2, "fp8_cuda", "per_thread", "fp32+fp32")),
        ("cuda:9.0,sageattention:2.2.0", {}, (2, "fp8_cuda_sm90", "per_thread", "fp32+fp32")),
        ("cuda:12.0,sageattention:2.2.0", {}, (2, "fp8_cuda", "per_warp", "fp32")),
        ("cuda:12.1,sageattention:2.2.0", {}, (2, "fp8_cuda", "per_warp", "fp32")),
        (
            "cuda:12.0,sageattention:2.2.0",
            {"kernel": "fp16_cuda"},
            (2, "fp16_cuda", "per_warp", "fp32"),
        ),
        (
            "cuda:9.0,sageattention:2.2.0",
            {"kernel": "fp16_cuda", "pv_accum_dtype": "fp16", "qk_quant_gran": "per_warp"},
            (2, "fp16_cuda", "per_warp", "fp16"),
        ),
        ("cuda:9.0", {}, None),
        ("cuda:10.0,sageattention:2.2.0", {}, None),
    ],
)
def test_the_kernel_for_a_machine(where: str, config: Any, expected: Any) -> None:
    choice = choose(VIDEO, SageConfig(**config), machine(where))
    found = choice and (
        choice.generation,
        choice.kernel,
        choice.qk_quant_gran,
        choice.pv_accum_dtype,
    )
    assert found == expected


def test_every_default_is_one_its_kernel_takes() -> None:
    for arch, (name, granularity, accumulator) in kernels.DEFAULTS.items():
        kernel = KERNELS[name]
        assert arch in kernel.architectures
        assert granularity is None or granularity in kernel.granularities
        assert accumulator is None or accumulator in kernel.accumulators


@pytest.mark.parametrize("arch", GPUS)
def test_gpus_are_those_of_the_vendors_dispatch(arch: str, pretended: Any, stand_in: Any) -> None:
    """Refused exactly where sageattention 2 itself raises; 1.0.6 and 3 have rules of their own."""
    refused_1 = platform_reasons(SAGE, machine(f"cuda:{arch},sageattention:1.0.6"))
    assert codes(refused_1) == (["compute-capability"] if arch == "7.5" else [])
    refused_2 = platform_reasons(SAGE, machine(f"cuda:{arch},sageattention:2.2.0"))
    with pretended(arch, stand_in("sageattention 2")):
        import sageattention  # type: ignore[import-not-found]

        sageattention.ARCH = f"sm{arch.replace('.', '')}"
        x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
        try:
            sageattention.sageattn(x, x, x)
        except ValueError:
            assert codes(refused_2) == ["compute-capability"]
            assert arch in refused_2[0].message
        else:
            assert refused_2 == []
    refused_3 = platform_reasons(SAGE_3, machine(f"cuda:{arch},sageattn3:1.0.0"))
    assert codes(refused_3) == ([] if arch in ("12.0", "12.1") else ["compute-capability"])


@pytest.mark.parametrize(
    ("where", "config", "changes", "expected"),
    [
        ("cuda:9.0,sageattention:1.0.6", {}, {}, []),
        ("cuda:9.0,sageattention:1.0.6", {"kernel": "triton"}, {"head_dim": 96}, []),
        ("cuda:9.0,sageattention:1.0.6", {}, {"head_dim": 80}, ["head-dim"]),
        ("cuda:9.0,sageattention:1.0.6", {}, {"mask": "key_padding"}, ["mask"]),
        ("cuda:9.0,sageattention:1.0.6", {}, {"needs_lse": True}, ["lse"]),
        ("cuda:9.0,sageattention:1.0.6", {}, {"is_causal": True}, []),
        (
            "cuda:9.0,sageattention:1.0.6",
            {"kernel": "fp8_cuda", "qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32"},
            {"is_causal": True, "key_length": 77},
            ["causal", "kernel", "parameter", "parameter"],
        ),
        ("cuda:9.0,sageattention:2.2.0", {}, {"head_dim": 80, "needs_lse": True}, []),
        ("cuda:9.0,sageattention:2.2.0", {}, {"mask": "additive", "key_length": 77}, []),
        ("cuda:9.0,sageattention:2.2.0", {}, {"is_causal": True, "key_length": 77}, ["causal"]),
        ("cuda:9.0,sageattention:2.2.0", {}, {"is_causal": True, "mask": "boolean",
            "query_length": 77, "key_length": 77}, ["mask"]),
        ("cuda:9.0,sageattention:2.2.0", {"kernel": "fp8_cuda"}, {"mask": "boolean"}, ["mask"]),
        ("cuda:9.0,sageattention:2.2.0", {}, {"mask": "boolean", "query_length": 75600,
            "key_length": 75600}, ["mask"]),
        ("cuda:9.0,sageattention:2.2.0", {"kernel": "triton", "pv_accum_dtype": "fp32"}, {},
            ["parameter"]),
        ("cuda:9.0,sageattention:2.2.0", {"pv_accum_dtype": "fp32"}, {}, ["parameter"]),
        ("cuda:8.9,sageattention:2.2.0", {"pv_accum_dtype": "fp32+fp16"}, {}, []),
        ("cuda:8.9,sageattention:2.1.1", {"pv_accum_dtype": "fp32+fp16"}, {}, ["version"]),
        ("cuda:8.9,sageattention:2.2.0", {"kernel": "fp8_cuda_sm90"}, {}, ["compute-capability"]),
        ("cuda:12.0,sageattention:2.2.0", {"kernel": "triton"}, {}, ["compute-capability"]),
        ("cuda:12.0,sageattention:2.2.0", {}, {"mask": "boolean", "query_length": 77,
            "key_length": 77}, ["compute-capability"]),
        ("cuda:12.0,sageattention:2.2.0", {}, {"key_length": 178000}, ["length"]),
        ("cuda:12.0,sageattention:2.2.0", {"kernel": "fp16_cuda"}, {"key_length": 178000}, []),
    ],
)  # fmt: skip
def test_what_a_version_cannot_do_is_refused(
    where: str, config: Any, changes: Any, expected: list[str]
) -> None:
    """A parameter the installed version does not offer is a reason, never ignored."""
    reasons = request_reasons(SAGE, replace(VIDEO, **changes), SageConfig(**config), machine(where))
    assert codes(reasons) == expected


@pytest.mark.parametrize(
    ("where", "changes", "expected"),
    [
        ("cuda:9.0,sageattention:1.0.6", {"mask": "boolean", "key_length": 77}, kernels.INSTALL_2),
        ("cuda:9.0,sageattention:1.0.6", {"head_dim": 80}, kernels.INSTALL_2),
        ("cuda:9.0,sageattention:1.0.6", {"head_dim": 256}, None),
        ("cuda:9.0,sageattention:1.0.6", {"needs_lse": True, "needs_grad": True}, None),
        ("cuda:9.0,sageattention:1.0.6", {"needs_lse": True, "is_causal": True,
            "key_length": 77}, None),
        ("cuda:10.0,sageattention:1.0.6", {"mask": "boolean", "key_length": 77}, None),
        ("cuda:12.0,sageattention:1.0.6", {"mask": "boolean", "key_length": 77}, None),
        ("cuda:12.0,sageattention:1.0.6", {"needs_lse": True}, kernels.INSTALL_2),
        ("cuda:8.9,sageattention:2.1.1", {}, kernels.INSTALL_2),
        ("cuda:8.9,sageattention:2.1.1", {"is_causal": True, "key_length": 77}, None),
    ],
)  # fmt: skip
def test_another_version_is_hinted_where_it_would_serve(
    where: str, changes: Any, expected: str | None
) -> None:
    """One command for all reasons together, or none: never a circle of versions."""
    config = SageConfig(pv_accum_dtype="fp32+fp16" if "2.1.1" in where else None)
    reasons = request_reasons(SAGE, replace(VIDEO, **changes), config, machine(where))
    assert {each.hint for each in reasons if "sageattention" in each.message} == {expected}


def test_never_chosen_automatically(pretended: Any, stand_in: Any) -> None:
    with pretended("9.0", stand_in("sageattention 1")):
        try:
            chosen = polyattn.select(request=VIDEO).chosen
        except BackendUnavailableError:  # nothing else is installed
            return
        assert not chosen.startswith("sage")


def test_parameters_out_of_range() -> None:
    for config in ("kernel=cuda", "pv_accum_dtype=fp8", "check_finite=sometimes"):
        with pytest.raises(ConfigError, match=config.partition("=")[0]):
            polyattn.select("sage", request=VIDEO, config=config)


# --- what is installed ----------------------------------------------------------------------------


def test_ranges_are_those_of_the_extra() -> None:
    """The extra of the distribution and the declaration of the backend name one range."""
    extra = [
        Requirement(text)
        for text in importlib_metadata.requires("polyattn-sage") or ()
        if 'extra == "kernel"' in text.replace("'", '"')
    ]
    declared = {each.distribution: each.specifier for each in SAGE.requirements}
    (needed,) = extra
    assert (needed.name, str(needed.specifier)) == ("sageattention", declared["sageattention"])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("cuda:9.0,sageattention:1.0.6", {}),
        ("cuda:9.0,sageattention:2.1.1", {}),
        ("cuda:9.0,sageattention:2.2.0", {}),
        ("cuda:9.0,sageattention:2.2.0+cu130torch2.11", {}),
        ("cuda:9.0,sageattention:none", {"requirement-missing": EXTRA}),
        ("cuda:9.0,sageattention:1.0.5", {"requirement-version": EXTRA}),
        ("cuda:9.0,sageattention:2.0.1", {"requirement-version": kernels.INSTALL_2}),
        ("cuda:9.0,sageattention:2.1.0", {"requirement-version": kernels.INSTALL_2}),
        ("cuda:9.0,sageattention:3.0.0", {"requirement-version": kernels.INSTALL_2}),
        ("cuda:10.0,sageattention:2.0.1", {"requirement-version": kernels.INSTALL_1}),
        ("cuda:9.0,sageattention:no-version", {"requirement-version": EXTRA}),
    ],
)
def test_versions_in_range(where: str, expected: dict[str, str]) -> None:
    """What is hinted lies in the range and, where the GPU allows, is no step back from 2 to 1."""
    reasons = availability_reasons(SAGE, machine(where))
    assert {each.code: each.hint for each in reasons} == expected
    for reason in reasons:
        assert "needs sageattention 1.0.6, or 2.1.1 up to 3," in reason.message
        version = where.rpartition(":")[2]
        assert version == "none" or f"found sageattention {version}" in reason.message


@pytest.mark.parametrize(
    ("what", "version"), [("sageattention 2", "2.0.1"), ("sageattention 1", "no-version")]
)
def test_a_refused_version_is_one_reason(
    what: str, version: str, pretended: Any, stand_in: Any
) -> None:
    """Whatever else its files lack: they are replaced anyway."""
    folder = stand_in(what, version)
    (folder / "sageattention" / "_fused.abi3.so").unlink(missing_ok=True)
    with pretended("9.0", folder):
        status = {each.name: each for each in polyattn.backends()}["sage_attn"]
    assert codes(status.reasons) == ["requirement-version"]


def emptied(folder: Path) -> Path:
    """What an uninstall leaves when a cache lay in the package: metadata or not, no code."""
    (folder / "sageattention" / "__init__.py").unlink()
    return folder


def without_metadata(folder: Path) -> Path:
    (metadata,) = folder.glob("sageattention-*.dist-info")
    for file in metadata.iterdir():
        file.unlink()
    metadata.rmdir()
    return folder


def without_kernels(folder: Path) -> Path:
    (folder / "sageattention" / "_fused.abi3.so").unlink()
    return folder


def with_kernels(folder: Path) -> Path:
    (folder / "sageattention" / "_fused.abi3.so").touch()
    return folder


def of_another_distribution(folder: Path) -> Path:
    (folder / "sageattention" / "__init__.py").unlink()
    source = {"sageattention.__init__": "def sageattn(*anything): ..."}
    return fake_distribution(without_metadata(folder), "sage-attention-fork", "9.9", {}, source)


@pytest.mark.parametrize(
    ("what", "damage", "code", "words"),
    [
        ("sageattention 1", emptied, "installation-broken", "holds no code"),
        ("sageattention 2", without_kernels, "installation-broken", "_fused"),
        ("sageattention 1", with_kernels, "installation-broken", "installed over the other"),
        (
            "sageattention 1",
            lambda folder: without_metadata(emptied(folder)),
            "leftover",
            "as after an uninstall",
        ),
        (
            "sageattention 1",
            of_another_distribution,
            "wrong-distribution",
            "sage-attention-fork",
        ),
        ("sageattention 1", without_metadata, "wrong-distribution", "no distribution"),
    ],
)
def test_bad_installations_are_reasons(
    what: str,
    damage: Callable[[Path], Path],
    code: str,
    words: str,
    pretended: Any,
    stand_in: Any,
) -> None:
    """Seen without importing, and other backends are listed all the same."""
    if damage not in (without_kernels, with_kernels) and is_installed("sageattention"):
        pytest.skip("sageattention itself is installed here, behind the damaged one")
    with pretended("9.0", damage(stand_in(what))):
        listed = {each.name: each for each in polyattn.backends()}
        reasons = {each.code: each for each in listed["sage_attn"].reasons}
        assert words in reasons[code].message
        assert any(each.hint for each in reasons.values())
        assert "sageattention" not in sys.modules
        assert "sage_attn_3" in listed
        with pytest.raises(BackendUnavailableError, match=words):
            polyattn.attention(*inputs(), backend="sage")


@pytest.mark.parametrize(
    ("first_line", "words", "hint"),
    [
        (
            "import no_such_library.part",
            "ModuleNotFoundError: No module named 'no_such_library'",
            "pip install no_such_library",
        ),
        ("raise ModuleNotFoundError('No x', name='triton')", "No x", "pip install triton"),
        ("import torch.no_such_part", "No module named 'torch.no_such_part'", None),
        ("import sageattention._fused", "No module named 'sageattention._fused'", REINSTALL),
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            "libcudart.so.12",
            REINSTALL,
        ),
        ("raise ImportError('_fused: undefined symbol: _ZN')", "undefined symbol", REINSTALL),
        ("raise OSError('invalid ELF header')", "OSError: invalid ELF header", REINSTALL),
        ("raise SystemExit('no nvcc')", "SystemExit: no nvcc", REINSTALL),
        ("sageattn = None; del sageattn", "has no such function", REINSTALL),
    ],
)
def test_packages_that_do_not_load_are_tried_once(
    first_line: str, words: str, hint: str | None, pretended: Any, tmp_path: Path
) -> None:
    """The call says why, and from then on the probes do, without importing again."""
    count = tmp_path / "imports"
    source = {"sageattention.__init__": f"open({str(count)!r}, 'a').write('x')\n{first_line}"}
    folder = fake_distribution(tmp_path, "sageattention", "1.0.6", {}, source)
    with pretended("9.0", folder):
        assert not {each.name: each for each in polyattn.backends()}["sage_attn"].reasons
        for _ in range(2):
            with pytest.raises(BackendUnavailableError, match="sageattention 1.0.6") as caught:
                polyattn.attention(*inputs(), backend="sage")
            assert words in str(caught.value)
        (reason,) = {each.name: each for each in polyattn.backends()}["sage_attn"].reasons
    assert words in reason.message
    assert reason.hint == hint
    assert count.read_text() == "x"


def test_kernels_left_out_of_a_build(pretended: Any, stand_in: Any) -> None:
    folder = stand_in("sageattention 2")
    (folder / "sageattention" / "core.py").write_text("SM80_ENABLED = SM90_ENABLED = False\n")
    with pretended("9.0", folder):
        for kernel in ("auto", "fp16_cuda"):
            with pytest.raises(BackendUnavailableError, match="built without") as caught:
                polyattn.attention(*inputs(), backend="sage", config={"kernel": kernel})
            assert "TORCH_CUDA_ARCH_LIST=9.0" in str(caught.value)
        polyattn.attention(*inputs(), backend="sage", config={"kernel": "triton"})


@pytest.mark.parametrize("missing", ["fp4attn_cuda", "fp4quant_cuda", "sageattn3"])
def test_sageattn3_needs_all_of_its_modules(missing: str, pretended: Any, stand_in: Any) -> None:
    folder = stand_in("sageattn3")
    for path in (folder / f"{missing}.py", folder / missing / "__init__.py"):
        path.unlink(missing_ok=True)
    with pretended("12.0", folder):
        status = {each.name: each for each in polyattn.backends()}["sage_attn_3"]
    assert any(missing in each.message for each in status.reasons)
    assert status.reasons[0].hint == kernels.INSTALL_3


def test_fastvideos_modules_of_the_same_name(pretended: Any, stand_in: Any, tmp_path: Path) -> None:
    source = {"fp4attn_cuda": "", "fp4quant_cuda": "", "fastvideo_kernel": ""}
    folder = fake_distribution(tmp_path, "fastvideo-kernel", "0.3.5", {}, source)
    with pretended("12.0", stand_in("sageattn3"), folder):
        status = {each.name: each for each in polyattn.backends()}["sage_attn_3"]
    assert [each.code for each in status.reasons] == ["name-clash"]
    assert "fastvideo-kernel 0.3.5" in status.reasons[0].message


# --- the vendor's defects -------------------------------------------------------------------------


def inputs(
    queries: int = 40, keys: int | None = None, head_dim: int = 64, heads: int = 2, batch: int = 1,
    bias: float = 0.0, dtype: torch.dtype = torch.bfloat16, kv_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Normal q, k, v; ``bias`` is the size of a constant in each channel of k."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    keys, kv_heads = keys or queries, kv_heads or heads
    q = draw(batch, queries, heads, head_dim) * 1.5
    k = draw(batch, keys, kv_heads, head_dim) + bias * draw(1, 1, kv_heads, head_dim)
    v = draw(batch, keys, kv_heads, head_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend(*tensors: torch.Tensor, backend: str = "sage", **arguments: Any) -> tuple[Any, Any]:
    """The result and the facts in the report."""
    with reporting_to(Report()) as report:
        result = polyattn.attention(*tensors, backend=backend, **arguments)
    (row,) = report.rows
    return result, row.facts


@pytest.fixture
def sage1(pretended: Any, stand_in: Any) -> Iterator[Any]:
    with pretended("9.0", stand_in("sageattention 1")):
        import sageattention

        yield sageattention


@pytest.fixture
def sage2(pretended: Any, stand_in: Any) -> Iterator[Any]:
    with pretended("9.0", stand_in("sageattention 2")):
        import sageattention

        yield sageattention


@pytest.fixture
def sage3(pretended: Any, stand_in: Any) -> Iterator[Any]:
    with pretended("12.0", stand_in("sageattn3")):
        import sageattn3  # type: ignore[import-not-found]

        yield sageattn3


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [1, 77, 120, 128, 200])
def test_last_block_of_keys(sage1: Any, keys: int, head_dim: int) -> None:
    """1.0.6 by itself loses up to the share of the empty slots; the backend loses nothing."""
    q, k, v = inputs(keys=keys, head_dim=head_dim, bias=10.0)
    expected = oracle.attention(q, k, v)
    assert isinstance(expected, torch.Tensor)
    direct = sage1.sageattn(q, k.clone(), v, tensor_layout="NHD")
    sage1.CALLS.clear()
    out, facts = attend(q, k, v)
    assert measure(out, expected).relative_l1 < 0.006
    empty = -keys % 64
    if empty:
        assert measure(direct, expected).norm > 0.01
        assert facts["tail"] == f"{empty} empty keys, corrected by a second pass"
    else:
        assert "tail" not in facts
    assert len(sage1.CALLS) == (2 if empty else 1)


@pytest.mark.parametrize(("keys", "passes"), [(32256, 1), (32705, 1), (8190, 1), (8200, 2)])
def test_a_bounded_loss_is_reported_and_not_paid_for(sage1: Any, keys: int, passes: int) -> None:
    """Below half a unit in the last place of bfloat16, one pass; the bound holds."""
    q, k, v = inputs(queries=3, keys=keys, heads=1)
    out, facts = attend(q, k, v)
    assert len(sage1.CALLS) == passes
    empty = -keys % 64
    expected = oracle.attention(q, k, v)
    assert isinstance(expected, torch.Tensor)
    assert measure(out, expected).norm < 2**-8
    if empty and passes == 1:
        assert empty / (keys + empty) <= 2**-9
        assert (
            facts["tail"] == f"{empty} empty keys, which weigh at most {empty / (keys + empty):.3%}"
        )


def test_causal_needs_no_correction(sage1: Any) -> None:
    q, k, v = inputs(queries=77)
    out, facts = attend(q, k, v, is_causal=True)
    expected = oracle.attention(q, k, v, is_causal=True)
    assert isinstance(expected, torch.Tensor)
    assert measure(out, expected).relative_l1 < 0.006
    assert "tail" not in facts
    assert len(sage1.CALLS) == 1


@pytest.mark.parametrize("which", ["sage1", "sage2", "sage3"])
def test_k_is_never_given_away(which: str, request: pytest.FixtureRequest) -> None:
    """The vendor gets a tensor of its own, whatever k's layout, and smooths nothing in it."""
    vendor = request.getfixturevalue(which)
    backend = "sage3" if which == "sage3" else "sage"
    for heads_first in (False, True):
        q, k, v = inputs(queries=64, bias=5.0)
        if heads_first:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        before = k.clone()
        attend(q, k, v, backend=backend)
        assert torch.equal(k, before)
        for call in vendor.CALLS:
            assert call["k"].untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
            assert call.get("smooth_k", False) is False


def test_log_sum_exp_of_a_biased_k(sage2: Any) -> None:
    """The correction is float32; the vendor's own is rounded to bfloat16 and is off by far more."""
    q, k, v = inputs(queries=77, head_dim=72, bias=30.0, heads=4, kv_heads=2)
    (_, lse), _ = attend(q, k, v, return_lse=True, enable_gqa=True)
    _, expected = oracle.attention(q, k, v, return_lse=True)
    _, own = sage2.sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, tensor_layout="NHD", return_lse=True)
    assert (lse - expected).abs().max() < 0.05
    assert (own - expected).abs().max() > 0.2


def test_additive_masks_come_in_the_kernels_unit(sage2: Any) -> None:
    """Given as it is, a bias would count 0.69 times; -inf and rows without keys are met too."""
    q, k, v = inputs(queries=77)
    bias = torch.randn(1, 2, 77, 77, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias[..., 5:9] = float("-inf")
    bias[:, :, 3] = float("-inf")
    out, facts = attend(q, k, v, attn_mask=bias)
    expected = oracle.attention(q, k, v, mask=bias)
    assert isinstance(expected, torch.Tensor)
    assert measure(out, expected).relative_l1 < 0.01
    assert (out[:, 3] == 0).all()
    assert facts["kernel"] == "triton"
    assert [call["kernel"] for call in sage2.CALLS] == ["triton"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [300.0, -3000.0])
def test_a_large_bias_keeps_its_differences(sage2: Any, size: float, dtype: torch.dtype) -> None:
    """Rounded a second time in the kernel's unit, 300 and noise would be off by a quarter."""
    q, k, v = inputs(queries=77, dtype=dtype)
    bias = (size + torch.randn(2, 77, 77, generator=torch.Generator().manual_seed(1))).to(dtype)
    bias[:, 3] = float("-inf")
    (out, lse), _ = attend(q, k, v, attn_mask=bias, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask=bias, return_lse=True)
    assert measure(out, expected).relative_l1 < 0.01
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.02, rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_mask_reaches_the_output(
    sage2: Any, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came in, and is not blamed on the kernel; -inf hides a key, and excuses nothing."""
    q, k, v = inputs()
    bias = torch.zeros(40, 40, dtype=torch.bfloat16)
    bias[:, 7] = float("-inf")
    with monkeypatch.context() as patch:
        name = "sageattn_qk_int8_pv_fp16_triton"
        patch.setattr(sage2, name, lambda q, k, v, **options: q * float("nan"))
        with pytest.raises(KernelError, match="NaN or infinity"):
            attend(q, k, v, attn_mask=bias)
    polyattn.dispatch.clear_decisions()
    bias[3, 5] = value
    out, _ = attend(q, k, v, attn_mask=bias)
    assert out[:, 3].isnan().all()
    assert out[:, :3].isfinite().all()
    assert out[:, 4:].isfinite().all()


def test_only_documented_options_reach_the_vendor(sage2: Any) -> None:
    """The stand-ins take no other keyword; what was configured is what arrives."""
    config = {"kernel": "fp8_cuda", "pv_accum_dtype": "fp32+fp16", "qk_quant_gran": "per_warp"}
    out, facts = attend(*inputs(), config=config)
    assert out.is_contiguous()
    (call,) = sage2.CALLS
    for name, value in config.items():
        assert call[name] == facts[name] == value


@pytest.mark.parametrize("which", ["sage1", "sage2", "sage3"])
def test_large_tensors_run_in_parts(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 32-bit offsets a call is split over batch items and heads, with equal results."""
    vendor = request.getfixturevalue(which)
    backend = "sage3" if which == "sage3" else "sage"
    arguments: dict[str, Any] = {}
    tensors = inputs(queries=128, batch=2, heads=4, kv_heads=4 if which == "sage3" else 2)
    if which != "sage3":
        arguments["enable_gqa"] = True
    if which == "sage2":
        arguments |= {"return_lse": True, "config": {"kernel": "triton"},
                      "attn_mask": torch.rand(2, 4, 128, 128) < 0.8}  # fmt: skip
    whole, facts = attend(*tensors, backend=backend, **arguments)
    assert "parts" not in facts
    vendor.CALLS.clear()
    monkeypatch.setattr(kernels, "OFFSETS", 128 * 64 * 2 + 1)
    monkeypatch.setattr("polyattn_sage.kernels._reasons_2", lambda *_: [])
    polyattn.dispatch.clear_decisions()
    parts, facts = attend(*tensors, backend=backend, **arguments)
    assert facts["parts"] == len(vendor.CALLS) == 4
    for one, two in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (whole, parts)), strict=True
    ):
        torch.testing.assert_close(one, two)
    for call in vendor.CALLS:
        last = sum((n - 1) * s for n, s in zip(call["k"].shape, call["k"].stride(), strict=True))
        assert last < kernels.OFFSETS
    monkeypatch.setattr(kernels, "OFFSETS", 128 * 64)
    polyattn.dispatch.clear_decisions()
    with pytest.raises(BackendUnavailableError, match=r"2\*\*31"):
        attend(*tensors, backend=backend, **arguments)


def test_views_beyond_the_offsets_are_copied(sage1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views into a packed q, k, v reach three times as far as their own elements."""
    packed = torch.stack(inputs(queries=128, heads=1), dim=2)
    q, k, v = packed.unbind(2)
    attend(q, k, v)
    assert sage1.CALLS[-1]["v"].data_ptr() == v.data_ptr()  # within reach: as it is
    monkeypatch.setattr(kernels, "OFFSETS", 128 * 64 + 1)
    polyattn.dispatch.clear_decisions()
    attend(q, k, v)
    assert sage1.CALLS[-1]["v"].is_contiguous()


def test_views_that_are_not_aligned_are_copied(sage2: Any) -> None:
    """The CUDA kernels read 16 bytes at a time, wherever a view begins."""
    wide = [torch.nn.functional.pad(x, (1, 6)) for x in inputs(queries=77)]
    q, k, v = (x[..., 1:65] for x in wide)
    out, _ = attend(q, k, v)
    expected = oracle.attention(q, k, v)
    assert isinstance(expected, torch.Tensor)
    assert measure(out, expected).relative_l1 < 0.006
    flat = torch.empty(q.numel() + 1, dtype=q.dtype)
    shifted = flat[1:].view(q.shape).copy_(q)  # contiguous, and off by one element
    assert torch.equal(attend(shifted, k, v)[0], out)


def test_channels_of_zeros_stay_zeros(sage2: Any) -> None:
    q, k, v = inputs(queries=77, heads=4, kv_heads=2)
    v[:, :, 1, 5] = 0
    for arguments in ({}, {"return_lse": True}):
        out, _ = attend(q, k, v, enable_gqa=True, config={"kernel": "fp8_cuda"}, **arguments)
        out = out[0] if arguments else out
        assert (out[:, :, 2:, 5] == 0).all()
        assert (out[:, :, :2, 5] != 0).any()
        assert out.isfinite().all()


# --- NaN and black frames -------------------------------------------------------------------------


def overflowing() -> tuple[torch.Tensor, ...]:
    """v beyond the range of fp16, to which the vendor casts it."""
    q, k, v = inputs(queries=64)
    return q, k, v * 1e6


def test_black_frames_are_an_error(sage1: Any) -> None:
    with pytest.raises(KernelError, match="NaN or infinity") as caught:
        attend(*overflowing())
    assert caught.value.hint == "backend='torch_sdpa'"
    assert "sageattention 1.0.6" in str(caught.value)
    out, facts = attend(*overflowing(), config={"check_finite": "never"})
    assert not out.isfinite().all()
    assert facts["check_finite"] == "never"


def test_when_the_output_is_searched(sage1: Any) -> None:
    """The first call, step 0 of every run, and all with ``always``: a later step is not."""
    good, bad = inputs(queries=64), overflowing()
    attend(*good)
    out, _ = attend(*bad)
    assert not out.isfinite().all()
    with polyattn.forward_context(step=3, num_steps=9):
        attend(*good)
        attend(*bad)
    with polyattn.forward_context(step=0, num_steps=9):
        with pytest.raises(KernelError, match="black frames"):
            attend(*bad)
    with pytest.raises(KernelError, match="black frames"):
        for tensors in (good, bad):
            attend(*tensors, config={"check_finite": "always"})


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"kernel": "triton"}, "config={'kernel': 'fp16_cuda', 'pv_accum_dtype': 'fp32'}"),
        (
            {"kernel": "fp16_cuda", "pv_accum_dtype": "fp16"},
            "config={'kernel': 'fp16_cuda', 'pv_accum_dtype': 'fp32'}",
        ),
        ({"kernel": "fp16_cuda"}, "backend='torch_sdpa'"),
    ],
)
def test_the_remedy_is_one_that_can_be_had(
    sage2: Any, monkeypatch: pytest.MonkeyPatch, config: Any, hint: str
) -> None:
    for name in ("sageattn_qk_int8_pv_fp16_triton", "sageattn_qk_int8_pv_fp16_cuda"):
        monkeypatch.setattr(sage2, name, lambda q, k, v, **options: q * float("nan"))
    with pytest.raises(KernelError, match="black frames") as caught:
        attend(*inputs(), config=config)
    assert caught.value.hint == hint


def test_the_search_waits_for_the_gpu_once(sage1: Any) -> None:
    """Each value that the host reads is one synchronisation."""
    waits = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten._local_scalar_dense.default:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        attend(*inputs(queries=64))
    assert len(waits) == 1


def test_nan_that_came_in_is_not_blamed_on_the_kernel(sage1: Any) -> None:
    q, k, v = inputs(queries=64)
    v[0, 3] = float("nan")
    out, _ = attend(q, k, v)
    assert out.isnan().any()


# --- failures of the vendor -----------------------------------------------------------------------


def test_a_failing_kernel_is_named(sage2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By core, which also knows what a CUDA error means for the process."""

    def fails(*tensors: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(sage2, "sageattn_qk_int8_pv_fp8_cuda_sm90", fails)
    with pytest.raises(KernelError, match="no kernel image") as caught:
        attend(*inputs())
    for words in ("sageattention 2.2.0", "lost its device"):
        assert words in str(caught.value)


# --- SageAttention 3 ------------------------------------------------------------------------------


def test_sage3_says_what_it_keeps_in_memory(sage3: Any) -> None:
    """[B, H, Sq/128, Sk] in float32, both lengths rounded up to 128."""
    _, facts = attend(*inputs(queries=1000, keys=500, heads=2), backend="sage3")
    assert facts["delta_s"] == f"{2 * 8 * 512 * 4 / 2**20:.1f} MiB"
    assert facts["version"] == "sageattn3 1.0.0"
    config = {"per_block_mean": False}
    _, facts = attend(*inputs(queries=1000, keys=500), backend="sage3", config=config)
    assert facts["delta_s"] == f"{2 * 512 * 4 / 2**20:.1f} MiB"
    assert [call["per_block_mean"] for call in sage3.CALLS] == [True, False]


# --- the real package -----------------------------------------------------------------------------

INTERPRETED = """
import inspect, json, sys
import torch
import sageattention.core as core
# The interpreter runs on CPU tensors; the vendor's one check for CUDA is left out.
source = inspect.getsource(core).replace("assert q.is_cuda", "assert q is not None")
exec(compile(source, core.__file__, "exec"), core.__dict__)
import sageattention
sageattention.sageattn = core.sageattn
from polyattn.contract import AttentionCall, AttentionRequest
from polyattn.environment import Environment
from polyattn.testing import oracle
from polyattn.testing.accuracy import measure
from polyattn_sage.attention import build
from polyattn_sage.config import SageConfig
machine = Environment.assume("cuda:9.0,sageattention:1.0.6", base=Environment())
answer = []
for head_dim in (64, 96, 128):
    for keys, is_causal in ((1, False), (77, False), (120, False), (200, False), (77, True)):
        generator = torch.Generator().manual_seed(0)
        shape = (1, keys, 2, head_dim)
        q = torch.randn(1, 77, 2, head_dim, generator=generator).bfloat16() * 1.5
        k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in "kv")
        k += 10 * torch.randn(1, 1, 2, head_dim, generator=generator)
        request = AttentionRequest(
            batch=1, query_length=77, key_length=keys, heads=2, kv_heads=2, head_dim=head_dim,
            dtype="bfloat16", is_causal=is_causal,
        )
        expected = oracle.attention(q, k, v, is_causal=is_causal)
        before = k.clone()
        found = build(SageConfig(), request, machine)(
            q, k, v, AttentionCall(is_causal, head_dim**-0.5)
        )
        assert torch.equal(k, before)
        direct = core.sageattn(q, k, v, tensor_layout="NHD", is_causal=is_causal)
        case = {"head_dim": head_dim, "keys": keys, "is_causal": is_causal}
        for name, out in (("backend", found), ("vendor", direct)):
            errors = measure(out, expected)
            case[name] = {"norm": errors.norm, "l1": errors.relative_l1}
        answer.append(case)
with open(sys.argv[1], "w") as file:
    json.dump(answer, file)
"""


def test_real_kernels_in_tritons_interpreter(tmp_path: Path) -> None:
    """sageattention 1.0.6 itself: its defect is there without the backend and not with it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    try:
        version = importlib_metadata.version("sageattention")
    except importlib_metadata.PackageNotFoundError:
        pytest.skip("sageattention is not installed")
    if version != "1.0.6":
        pytest.skip(f"sageattention {version} is installed, not 1.0.6")
    numpy_version = importlib_metadata.version("numpy")
    if Version(numpy_version) >= Version("2.3"):
        pytest.skip(f"Triton's interpreter needs numpy < 2.3, found {numpy_version}")
    answer = tmp_path / "answer.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(answer)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case in json.loads(answer.read_text()):
        assert case["backend"]["l1"] < 0.03, case
        assert case["backend"]["norm"] < 0.01, case
        if case["keys"] % 64 and not case["is_causal"]:
            assert case["vendor"]["norm"] > 0.01, case


def test_capture_into_a_cuda_graph() -> None:
    """The Triton kernels can be captured; the search for NaN is then left out, and said so."""
    environment = Environment.detect()
    if availability_reasons(SAGE, environment) or platform_reasons(SAGE, environment):
        pytest.skip("needs a GPU and sageattention")
    with default_settings():
        q, k, v = (x.cuda() for x in inputs(queries=200))
        config = {"kernel": "triton"}
        expected, facts = attend(q, k, v, config=config)
        assert facts["check_finite"] == "first_step"
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with polyattn.forward_context(step=0), torch.cuda.graph(graph):
            captured, facts = attend(q, k, v, config=config)
        assert facts["check_finite"] == "left out of a CUDA graph"
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, expected)
