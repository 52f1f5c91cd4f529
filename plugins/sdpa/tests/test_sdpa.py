"""What is special to torch_sdpa: which of torch's kernels runs where, and why one cannot."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import polyattn
from polyattn.contract import AttentionRequest
from polyattn.environment import KNOWN_PLATFORMS, Environment
from polyattn.errors import BackendUnavailableError, ConfigError
from polyattn.reporting import Report, reporting_to
from polyattn.testing import default_settings, oracle
from polyattn_sdpa.config import SdpaConfig
from polyattn_sdpa.kernels import KERNELS, choose, kernel_reasons, limits_of

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
CPU_KERNELS = ("auto", "flash", "math")


def machine(text: str) -> Environment:
    return Environment.assume(f"{text},torch:2.11.0", base=Environment())


def codes(kernel: str, machine_text: str, **changes: Any) -> list[str]:
    return [
        each.code for each in limits_of(kernel, replace(VIDEO, **changes), machine(machine_text))
    ]


@pytest.fixture(autouse=True)
def nobody_configured_anything() -> Any:
    with default_settings():
        yield


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "changes", "kernel"),
    [
        ("cuda:9.0", {}, "cudnn"),
        ("cuda:9.0", {"is_causal": True}, "cudnn"),
        ("cuda:9.0", {"key_length": 77}, "cudnn"),
        ("cuda:9.0", {"head_dim": 64}, "cudnn"),
        ("cuda:9.0", {"query_length": 2304}, "cudnn"),
        ("cuda:9.0", {"query_length": 2303}, "default"),
        ("cuda:9.0", {"mask": "boolean"}, "default"),
        ("cuda:9.0", {"head_dim": 32}, "default"),
        ("cuda:9.0", {"query_length": 77}, "default"),
        ("cuda:9.0", {"query_length": None}, "default"),
        ("cuda:9.0", {"head_dim": 256}, "default"),
        ("cuda:9.0", {"dtype": "float32"}, "default"),
        ("cuda:8.0", {}, "default"),
        ("cuda:12.0", {}, "default"),
        ("rocm:gfx942", {}, "default"),
        *((platform, {}, "default") for platform in ("mps", "npu", "xpu", "cpu")),
    ],
)
def test_cudnn_is_chosen_in_one_place_only(where: str, changes: Any, kernel: str) -> None:
    """Long sequences of D = 40 to 128 on compute capability 9.0; elsewhere torch's own choice."""
    assert choose(replace(VIDEO, **changes), SdpaConfig(), machine(where)).kernel == kernel


def test_a_choice_is_one_its_limits_allow() -> None:
    """Whatever is chosen for a machine can serve the request there."""
    requests = [
        replace(VIDEO, dtype=dtype, head_dim=head_dim, mask=mask, is_causal=is_causal)
        for dtype in ("float16", "bfloat16", "float32", "float64")
        for head_dim in (64, 72, 100, 128, 160, 256, 512)
        for mask in ("none", "boolean")
        for is_causal in (False, True)
    ]
    for where in ("cuda:7.5", "cuda:8.0", "cuda:9.0", "cuda:10.0", "rocm:gfx942", "cpu"):
        for request in requests:
            kernel = choose(request, SdpaConfig(), machine(where)).kernel
            assert kernel == "default" or not limits_of(kernel, request, machine(where))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_named_kernel_is_the_choice(kernel: str) -> None:
    choice = choose(VIDEO, SdpaConfig(kernel=kernel), machine("cuda:9.0"))
    assert (choice.kernel, choice.why) == (kernel, "configured")


# --- the limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "where", "changes", "expected"),
    [
        ("flash", "cuda:9.0", {}, []),
        ("flash", "cuda:7.5", {}, ["compute-capability"]),
        ("flash", "cuda:9.0", {"dtype": "float32"}, ["dtype"]),
        ("flash", "cuda:9.0", {"head_dim": 256}, []),
        ("flash", "cuda:9.0", {"head_dim": 264}, ["head-dim"]),
        ("flash", "cuda:9.0", {"head_dim": 100}, ["head-dim"]),
        ("flash", "cuda:9.0", {"mask": "key_padding"}, ["mask"]),
        ("flash", "cuda:9.0", {"is_causal": True}, []),
        ("flash", "cuda:9.0", {"is_causal": True, "key_length": 512}, ["causal"]),
        ("flash", "cuda:9.0", {"is_causal": True, "key_length": None}, []),
        ("flash", "mps", {}, ["platform"]),
        ("flash", "cpu", {"dtype": "float64", "mask": "additive", "head_dim": 7}, []),
        ("cudnn", "cuda:9.0", {}, []),
        ("cudnn", "cuda:10.0", {}, []),
        ("cudnn", "cuda:7.5", {}, ["compute-capability"]),
        ("cudnn", "cuda:9.0", {"head_dim": 136}, ["head-dim"]),
        ("cudnn", "cuda:9.0", {"mask": "boolean"}, []),
        ("cudnn", "cuda:9.0", {"dtype": "float32"}, ["dtype"]),
        ("cudnn", "rocm:gfx942", {}, ["platform"]),
        ("cudnn", "cpu", {}, ["platform"]),
        ("efficient", "cuda:7.5", {}, []),
        ("efficient", "cuda:9.0", {"dtype": "float64"}, ["dtype"]),
        ("efficient", "cuda:9.0", {"head_dim": 100}, ["head-dim"]),
        ("efficient", "cuda:9.0", {"head_dim": 100, "dtype": "float32"}, []),
        ("efficient", "cuda:9.0", {"mask": "additive"}, []),
        ("efficient", "cpu", {}, ["platform"]),
        (
            "flash",
            "cuda:7.5",
            {"dtype": "float32", "head_dim": 320, "mask": "boolean"},
            ["compute-capability", "dtype", "head-dim", "mask"],
        ),
    ],
)
def test_limits(kernel: str, where: str, changes: Any, expected: list[str]) -> None:
    """Every limit that is exceeded is named, and only those."""
    assert codes(kernel, where, **changes) == expected


@pytest.mark.parametrize("platform", KNOWN_PLATFORMS)
def test_math_runs_everywhere(platform: str) -> None:
    changes = {"dtype": "float64", "head_dim": 333, "mask": "additive", "is_causal": True}
    assert codes("math", platform, **changes) == []
    assert codes("math", platform) == []


def test_automatic_choice_refuses_nothing() -> None:
    request = replace(VIDEO, dtype="float64", head_dim=333, mask="additive")
    for platform in KNOWN_PLATFORMS:
        assert kernel_reasons(request, SdpaConfig(), machine(platform)) == []


def test_a_named_kernel_runs_or_is_an_error() -> None:
    """Selection for a machine that is not here says which limit, and what would serve instead."""
    with pytest.raises(BackendUnavailableError) as caught:
        polyattn.select(
            "torch_sdpa",
            request=replace(VIDEO, mask="boolean"),
            config="kernel=flash",
            environment=machine("cuda:9.0"),
        )
    assert "kernel=flash takes no mask, found a boolean mask" in str(caught.value)
    chosen = polyattn.select(
        "sdpa", request=VIDEO, config="kernel=flash", environment=machine("cuda:9.0")
    )
    assert (chosen.chosen, chosen.parameters) == ("torch_sdpa", {"kernel": "flash"})
    with pytest.raises(ConfigError, match="kernel"):
        polyattn.select("torch_sdpa", request=VIDEO, config="kernel=fastest")


# --- the kernels that run on a CPU ----------------------------------------------------------------


def inputs(dtype: torch.dtype, queries: int = 77, keys: int = 77, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, queries, 4, 64), (2, keys, 4, 64), (2, keys, 4, 64))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def sdpa(*tensors: torch.Tensor, kernel: str, **arguments: Any) -> Any:
    return polyattn.attention(
        *tensors, backend="torch_sdpa", config={"kernel": kernel}, **arguments
    )


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["plain", "causal", "causal unequal", "mask", "scale", "bias"])
def test_log_sum_exp_is_exact(kernel: str, dtype: torch.dtype, variant: str) -> None:
    """To float32 rounding, and in half types to torch's fast exp: scores stay float32."""
    q, k, v = inputs(dtype, keys=40 if variant == "causal unequal" else 77)
    arguments: dict[str, Any] = {"is_causal": "causal" in variant}
    if variant == "scale":
        arguments["scale"] = 0.31
    mask = None
    if variant in ("mask", "bias"):
        mask = torch.rand(2, 4, 77, 77, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[:, :, 5] = False
        if variant == "bias":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
    _, lse = sdpa(q, k, v, kernel=kernel, attn_mask=mask, return_lse=True, **arguments)
    _, expected = oracle.attention(q, k, v, mask=mask, return_lse=True, **arguments)
    assert lse.dtype is torch.float32
    assert torch.equal(lse.isneginf(), expected.isneginf())
    seen = expected.isfinite()
    tolerance = 1e-4 if dtype.itemsize == 2 else 2e-6
    torch.testing.assert_close(lse[seen].double(), expected[seen], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_without_keys_are_zeros_with_finite_gradients(kernel: str, dtype: torch.dtype) -> None:
    """Torch gives NaN or a mean of all values, depending on the kernel; the contract says zeros."""
    q, k, v = (each.requires_grad_() for each in inputs(dtype))
    mask = torch.ones(1, 1, 77, 77, dtype=torch.bool)
    mask[..., 7:10, :] = False
    out = sdpa(q, k, v, kernel=kernel, attn_mask=mask)
    assert (out[:, 7:10] == 0).all()
    assert (out[:, :7] != 0).any()
    for name, gradient in zip("qkv", torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.isfinite().all(), name
        if name == "q":
            assert (gradient[:, 7:10] == 0).all()


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_the_kernel_named_is_the_kernel_run(kernel: str) -> None:
    """Told by the operators torch dispatches, and by the report."""
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with reporting_to(Report()) as report, Recorder():
        sdpa(*inputs(torch.float32), kernel=kernel)
    flash_ran = any("flash_attention_for_cpu" in name for name in seen)
    assert flash_ran == (kernel != "math")
    assert report.rows[0].facts["kernel"] == ("math" if kernel == "math" else "flash")


def test_kernels_of_threads_do_not_meet() -> None:
    """Each thread gets the kernel it named, and torch's process-wide switches are not touched."""
    switches = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
    )
    before = [switch() for switch in switches]
    start = threading.Barrier(4)
    problems: list[str] = []

    def work(index: int) -> None:
        kernel = ("flash", "math")[index % 2]
        q, k, v = inputs(torch.float32, seed=index)
        expected = oracle.attention(q, k, v, is_causal=True)
        start.wait(timeout=30)
        with reporting_to(Report()) as report:
            for _ in range(25):
                out = sdpa(q, k, v, kernel=kernel, is_causal=True)
                if [switch() for switch in switches] != before:
                    problems.append("a process-wide switch changed")
                if not torch.allclose(out.double(), expected, atol=1e-5):
                    problems.append(f"thread {index} got another answer")
        if [row.facts["kernel"] for row in report.rows] != [kernel]:
            problems.append(f"thread {index} asked for {kernel}, ran {report}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
