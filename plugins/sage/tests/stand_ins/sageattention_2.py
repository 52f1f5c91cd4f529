"""Stands in for sageattention 2.2.0: its dense functions as documented, and their quirks.

No ``**kwargs``: the vendor swallows what it does not know, and a caller must not rely on that.
"""

import torch
import torch.nn.functional as F

ARCH = "sm90"
CALLS = []


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
    same = {
        "tensor_layout": tensor_layout,
        "is_causal": is_causal,
        "sm_scale": sm_scale,
        "return_lse": return_lse,
    }
    if ARCH == "sm80":
        return sageattn_qk_int8_pv_fp16_cuda(q, k, v, **same, pv_accum_dtype="fp32")
    if ARCH == "sm86":
        return sageattn_qk_int8_pv_fp16_triton(q, k, v, **same)
    if ARCH == "sm89":
        return sageattn_qk_int8_pv_fp8_cuda(q, k, v, **same, pv_accum_dtype="fp32+fp16")
    if ARCH == "sm90":
        return sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, **same, pv_accum_dtype="fp32+fp32")
    if ARCH in ("sm120", "sm121"):
        return sageattn_qk_int8_pv_fp8_cuda(
            q, k, v, **same, qk_quant_gran="per_warp", pv_accum_dtype="fp32+fp16"
        )
    raise ValueError(f"Unsupported CUDA architecture: {ARCH}")


def sageattn_qk_int8_pv_fp16_triton(
    q,
    k,
    v,
    tensor_layout="HND",
    quantization_backend="triton",
    is_causal=False,
    attn_mask=None,
    sm_scale=None,
    smooth_k=True,
    return_lse=False,
):
    assert quantization_backend in ("triton", "cuda")
    if is_causal:
        assert attn_mask is None, "Mask should be None for causal attention."
        sequence = 1 if tensor_layout == "NHD" else 2
        assert q.shape[sequence] == k.shape[sequence]
    return _attend("triton", q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse,
                   attn_mask=attn_mask)  # fmt: skip


def sageattn_qk_int8_pv_fp16_cuda(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32",
    smooth_k=True,
    smooth_v=False,
    return_lse=False,
):
    return _cuda("fp16_cuda", ("fp32", "fp16", "fp16+fp32"), q, k, v, tensor_layout, is_causal,
                 qk_quant_gran, sm_scale, pv_accum_dtype, smooth_k, return_lse)  # fmt: skip


def sageattn_qk_int8_pv_fp8_cuda(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32+fp16",
    smooth_k=True,
    smooth_v=False,
    return_lse=False,
):
    return _cuda("fp8_cuda", ("fp32", "fp32+fp32", "fp32+fp16"), q, k, v, tensor_layout, is_causal,
                 qk_quant_gran, sm_scale, pv_accum_dtype, smooth_k, return_lse)  # fmt: skip


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32+fp32",
    smooth_k=True,
    return_lse=False,
):
    if pv_accum_dtype == "fp32":
        raise NotImplementedError("Please use pv_accum_dtype='fp32+fp32' for sm90.")
    return _cuda("fp8_cuda_sm90", ("fp32+fp32",), q, k, v, tensor_layout, is_causal,
                 qk_quant_gran, sm_scale, pv_accum_dtype, smooth_k, return_lse)  # fmt: skip


def _cuda(kernel, accumulators, q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale,
          pv_accum_dtype, smooth_k, return_lse):  # fmt: skip
    assert qk_quant_gran in ("per_warp", "per_thread")
    if pv_accum_dtype not in accumulators:
        raise ValueError(f"Unsupported pv_accum_dtype: {pv_accum_dtype}")
    # The CUDA kernels find a row's maximum before they scale.
    assert sm_scale is None or sm_scale > 0, "overflows"
    return _attend(kernel, q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse,
                   qk_quant_gran=qk_quant_gran, pv_accum_dtype=pv_accum_dtype)  # fmt: skip


def _attend(kernel, q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, return_lse,
            attn_mask=None, **options):  # fmt: skip
    for x in (q, k, v):  # read 16 bytes at a time
        assert x.data_ptr() % 16 == 0
        assert q.size(-1) not in (64, 128) or all(stride % 8 == 0 for stride in x.stride()[:-1])
    CALLS.append({"kernel": kernel, "k": k, "v": v, "smooth_k": smooth_k, **options})
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    head_dim = q.size(-1)
    if head_dim > 128:
        raise ValueError(f"Unsupported head_dim: {head_dim}")
    padding = (64 if head_dim <= 64 else 128) - head_dim
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype)
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if kernel.startswith("fp8"):  # a channel of zeros is divided by zero
        v = torch.where((v == 0).all(2, keepdim=True), float("nan"), v)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    shift = 0.0
    if smooth_k:
        mean = k.mean(dim=2, keepdim=True)
        k = k - mean
        shift = (q @ mean.transpose(-1, -2)).squeeze(-1).float() * scale
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if attn_mask is not None:
        assert attn_mask.dtype in (torch.bool, q.dtype)
        attn_mask = attn_mask.expand(scores.shape)
        if attn_mask.dtype is torch.bool:
            scores = scores + torch.where(attn_mask, 0.0, -1.0e6)
        else:
            scores = scores + attn_mask.float() / 1.44269504  # added to scores in units of log2
    if is_causal:  # aligned to the top left
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -float("inf")
        )
    result = scores.softmax(-1) @ v.float()
    out.copy_(result.transpose(1, 2) if tensor_layout == "NHD" else result)
    out = out[..., :head_dim]  # a view that is not contiguous where D was padded
    return (out, scores.logsumexp(-1) + shift) if return_lse else out
