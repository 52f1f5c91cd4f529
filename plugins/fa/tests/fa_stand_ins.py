"""Stand-ins for the vendor packages, and a CPU that passes for the GPU they need.

A stand-in takes exactly the documented arguments of its package (anything else is a TypeError),
holds its tensors to what the kernels read, computes in float32, and keeps the package's quirks:
what it returns, which log-sum-exp a row without keys gets, that a row's maximum is found before
scaling, that whole tiles of values are multiplied (a NaN behind the last key reaches the result).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from polyattn.contract import Architectures, BackendSpec, Implementation
from polyattn.environment import Environment
from polyattn.testing import isolated_registry
from polyattn_fa import SPEC, attention, generations, loading

# --- what every stand-in computes -----------------------------------------------------------------


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    without_keys: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[Sq, H, D] over [Sk, Hkv, D]: out [Sq, H, D], not contiguous, and lse [H, Sq]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), key)
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True) if keys else scores.new_full((*scores.shape[:2], 1), 0)
    blind = top.isneginf() | (keys == 0)
    weights = ((scores - top.masked_fill(blind, 0)) * scale).exp()
    sums = weights.sum(-1, keepdim=True)
    out = torch.einsum("hqk,khd->hqd", weights / sums.masked_fill(blind, 1), value)
    lse = (top * scale + sums.log()).masked_fill(blind, without_keys).squeeze(-1)
    return out.transpose(0, 1), lse


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    without_keys: float = float("-inf"),
) -> tuple[torch.Tensor, torch.Tensor]:
    hold(q, k, v, dimensions=4)
    parts = [attend(*item, scale, causal, without_keys) for item in zip(q, k, v, strict=True)]
    outs, lses = zip(*parts, strict=True)
    return torch.stack(outs).to(q.dtype), torch.stack(lses)


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor | None,
    ends_k: torch.Tensor | None,
    longest: tuple[int | None, int | None],
    scale: float | None,
    causal: bool,
    without_keys: float = float("-inf"),
) -> tuple[torch.Tensor, torch.Tensor]:
    hold(q, k, v, dimensions=3)
    assert ends_q is not None
    assert ends_k is not None
    assert len(ends_q) == len(ends_k)
    for ends, total, most in ((ends_q, len(q), longest[0]), (ends_k, len(k), longest[1])):
        assert ends.dtype is torch.int32
        assert ends.is_contiguous()
        assert 0 == ends[0] <= ends[-1] <= total
        assert 0 < ends.diff().min() <= ends.diff().max() <= most  # fa never sends an empty item
    tiles = 0 * v.float().sum()
    outs, lses = [], []
    for item in range(len(ends_q) - 1):
        queries, keys = (slice(ends[item], ends[item + 1]) for ends in (ends_q, ends_k))
        out, lse = attend(q[queries], k[keys], v[keys], scale, causal, without_keys)
        outs.append(out + tiles)
        lses.append(lse)
    return torch.cat(outs).to(q.dtype), torch.cat(lses, dim=1)


def hold(*tensors: torch.Tensor, dimensions: int) -> None:
    """What every generation's kernels require of q, k and v."""
    q, k, v = tensors
    assert k.shape == v.shape
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-2] % k.shape[-2] == 0
    for each in tensors:
        assert (each.dim(), each.dtype) == (dimensions, q.dtype)
        if each.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"only fp16 and bf16, found {each.dtype}")
        if each.shape[-1] % 8 or each.shape[-1] > 256:
            raise RuntimeError(f"head dimension {each.shape[-1]}")
        if each.stride(-1) != 1:
            raise RuntimeError("the last dimension must be contiguous")
        if each.data_ptr() % 16 or any(step % 8 or not step for step in each.stride()[:-1]):
            raise RuntimeError(f"rows are not aligned: {each.stride()}")


def no(name: str, value: Any, usual: Any) -> None:
    if value != usual:
        raise AssertionError(f"{name}={value!r} was passed, which fa never asks for")


# --- FA2: flash-attn 2.8.3, flash_attn/flash_attn_interface.py ------------------------------------


def flash_attn_2() -> dict[str, ModuleType]:
    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None,
        causal: bool = False, window_size: Any = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        no("dropout_p", dropout_p, 0.0)
        no("window_size", window_size, (-1, -1))
        out, lse = dense(q, k, v, softmax_scale, causal, without_keys=float("inf"))
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
        window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    ) -> Any:  # fmt: skip
        no("dropout_p", dropout_p, 0.0)
        longest = (max_seqlen_q, max_seqlen_k)
        out, lse = varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal, float("inf")
        )
        return (out, lse, None) if return_attn_probs else out

    return {"flash_attn": module("flash_attn", flash_attn_func, flash_attn_varlen_func)}


# --- FA3: hopper/flash_attn_interface.py, and the wheel fa3-fwd 0.0.3 -----------------------------

ALL_BUILT = ("BACKWARD", "LOCAL", "FP16", "VARLEN", "SM8x")
BUCKETS = tuple(f"HDIM{each}" for each in (64, 96, 128, 192, 256))


def fa3_flags(*disabled: str) -> Mapping[str, Any]:
    names = {f"FLASHATTENTION_DISABLE_{each}": each in disabled for each in ALL_BUILT + BUCKETS}
    return {"build_flags": names}


def flash_attn_3(name: str = "flash_attn_interface", *disabled: str) -> dict[str, ModuleType]:
    """A build of today: the log-sum-exp comes on request."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Any = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        limit(q, window_size)
        out, lse = dense(q, k, v, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
        causal: bool = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: int = 0,
        softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        limit(q, window_size)
        longest = (max_seqlen_q, max_seqlen_k)
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def limit(q: torch.Tensor, window_size: Any) -> None:
        if q.dtype is torch.float16 and "FP16" in disabled:
            raise RuntimeError("This flash attention build does not support FP16.")
        if window_size != (-1, -1) and "LOCAL" in disabled:
            raise RuntimeError("This flash attention build does not support local attention.")
        if q.requires_grad and "BACKWARD" in disabled:
            raise RuntimeError("Flash-Attention was built with backward disabled")

    config = ModuleType(name.replace("interface", "config"))
    config.CONFIG = fa3_flags(*disabled)  # type: ignore[attr-defined]
    found = module(name, flash_attn_func, flash_attn_varlen_func)
    return {name: found, config.__name__: config}


def fa3_fwd() -> dict[str, ModuleType]:
    return flash_attn_3("fa3_fwd_interface", "BACKWARD", "LOCAL", "FP16")


def old_flash_attn_3(*, returns_lse: bool) -> dict[str, ModuleType]:
    """Builds without ``return_attn_probs``: until July 2025 always (out, lse), then only out."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Any = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0,
    ) -> Any:  # fmt: skip
        result = dense(q, k, v, softmax_scale, causal)
        return result if returns_lse else result[0]

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
        causal: bool = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: int = 0,
        softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, sm_margin: int = 0,
    ) -> Any:  # fmt: skip
        longest = (max_seqlen_q, max_seqlen_k)
        result = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal)
        return result if returns_lse else result[0]

    name = "flash_attn_interface"
    return {name: module(name, flash_attn_func, flash_attn_varlen_func)}


# --- FA4: flash-attn-4 4.0.0b36, flash_attn/cute/interface.py -------------------------------------


def flash_attn_4() -> dict[str, ModuleType]:
    def flash_attn_func(
        q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None,
        softmax_scale: Any = None, causal: bool = False, window_size: Any = (None, None),
        learnable_sink: Any = None, softcap: float = 0.0, num_splits: int = 1,
        pack_gqa: Any = None, deterministic: bool = False, score_mod: Any = None,
        score_mod_bwd: Any = None, mask_mod: Any = None, aux_tensors: Any = None,
        aux_scalars: Any = None, block_sparse_tensors: Any = None,
        block_sparse_tensors_bwd: Any = None, return_lse: bool = False,
        gather_bwd_recompute_p: bool = False, gather_bwd_token_chunk: Any = None,
    ) -> Any:  # fmt: skip
        no("qv", qv, None)
        no("window_size", window_size, (None, None))
        out, lse = dense(q, k, v, softmax_scale, causal)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None,
        seqused_q: Any = None, seqused_k: Any = None, gather_kv_indices: Any = None,
        page_table: Any = None, softmax_scale: Any = None, causal: bool = False,
        window_size: Any = (None, None), learnable_sink: Any = None, softcap: float = 0.0,
        num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False,
        score_mod: Any = None, score_mod_bwd: Any = None, mask_mod: Any = None,
        block_sparse_tensors: Any = None, aux_tensors: Any = None, aux_scalars: Any = None,
        return_lse: bool = False, scheduler_metadata: Any = None, seqlen_k_per_split: Any = None,
        disable_scheduler_metadata: bool = False, gather_bwd_recompute_p: bool = False,
        gather_bwd_token_chunk: Any = None,
    ) -> Any:  # fmt: skip
        no("qv", qv, None)
        longest = (max_seqlen_q, max_seqlen_k)
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal)
        return out, lse if return_lse else None

    namespace = ModuleType("flash_attn")
    namespace.__path__ = []  # as flash-attn-4 leaves it: a namespace without a file
    cute = module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)
    return {"flash_attn": namespace, "flash_attn.cute": cute}


def module(name: str, *functions: Callable[..., Any]) -> ModuleType:
    made = ModuleType(name)
    for each in functions:
        setattr(made, each.__name__, each)
    return made


# --- a machine that is not here -------------------------------------------------------------------


def machine(text: str) -> Environment:
    """``cuda:9.0,fa3-fwd:0.0.3``, with a torch for CUDA 13."""
    made = Environment.assume(f"torch:2.11.0,{text}", base=Environment())
    return made.model_copy(update={"cuda": "13.0"} if made.platform == "cuda" else {})


_pretended: list[Environment] = []


def build(config: Any, request: Any, environment: Environment) -> Implementation:
    """fa's own factory, told of the pretended machine instead of this CPU."""
    return attention.build(config, request, _pretended[-1])


def spec_for(pretended: Environment) -> BackendSpec:
    """fa as it is, but for its view of the machine; the CPU counts as one of its platforms."""
    platforms = {**SPEC.capabilities.platforms, "cpu": Architectures()}
    return SPEC.model_copy(
        update={
            "capabilities": SPEC.capabilities.model_copy(update={"platforms": platforms}),
            "probe_availability": lambda _: generations.availability_reasons(pretended),
            "probe_request": lambda request, config, _: generations.request_reasons(
                request, config, pretended
            ),
            "implementation": "fa_stand_ins:build",
        }
    )


@contextlib.contextmanager
def pretending(
    text: str, *modules: Mapping[str, ModuleType], beside: tuple[BackendSpec, ...] = ()
) -> Iterator[Environment]:
    """Run on a pretended machine with these modules installed, and these backends beside fa."""
    pretended = machine(text)
    with clean_loading():
        for each in modules:
            sys.modules.update(each)
        _pretended.append(pretended)
        try:
            with isolated_registry(spec_for(pretended), *beside):
                yield pretended
        finally:
            _pretended.pop()


VENDORS = ("flash_attn", "flash_attn_interface", "flash_attn_config", "fa3_fwd_interface",
           "fa3_fwd_config", "fa3_fwd", "flash_attn_2_cuda")  # fmt: skip


@contextlib.contextmanager
def clean_loading() -> Iterator[None]:
    """No vendor module imported, nothing loaded, nothing failed; as before afterwards.

    FA4's disk cache counts as switched off by the user, so that nothing is written to his folders.
    """

    def vendors() -> dict[str, ModuleType]:
        return {n: m for n, m in sys.modules.items() if n.partition(".")[0] in VENDORS}

    held = vendors()
    loaded, failures = dict(loading._loaded), dict(generations.load_failures)
    for each in held:
        del sys.modules[each]
    loading._loaded.clear()
    generations.load_failures.clear()
    try:
        with mock.patch.dict(os.environ, {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}):
            yield
    finally:
        for each in vendors():
            del sys.modules[each]
        sys.modules.update(held)
        loading._loaded.clear()
        loading._loaded.update(loaded)
        generations.load_failures.clear()
        generations.load_failures.update(failures)
