"""A stand-in for the package ``aiter``: the parameters of three releases, computed in torch.

Each function takes what that release's ``flash_attn_func`` takes, and anything else is a TypeError.
They share the vendor's habits: half types only; last dimension made contiguous; head dimensions
padded to multiples of 8, up to 256, and the result cut back to a view; bottom-right causality;
32-bit byte offsets; a log-sum-exp in float32 where it is asked for. A query that sees no key gives
NaN, because the vendor's kernels differ there. ``calls`` keeps what each call was given.
"""

import torch

calls = []


def august_2026(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1, 0),
    bias=None,
    alibi_slopes=None,
    deterministic=True,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    sink_ptr=None,
    num_splits=0,
):
    assert tuple(window_size) == (-1, -1, 0)
    assert cu_seqlens_q is None
    assert cu_seqlens_kv is None
    assert sink_ptr is None
    assert num_splits == 0
    extras = (dropout_p, bias, alibi_slopes, return_attn_probs)
    return _bare(_attention(q, k, v, softmax_scale, causal, return_lse, how_v3_bf16_cvt, extras))


def release_0_1_5(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    bias=None,
    alibi_slopes=None,
    deterministic=True,
    return_lse=False,
    return_attn_probs=False,
):
    assert tuple(window_size) == (-1, -1)
    extras = (dropout_p, bias, alibi_slopes, return_attn_probs)
    return _bare(_attention(q, k, v, softmax_scale, causal, return_lse, None, extras))


def february_2025(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    alibi_slopes=None,
    deterministic=True,
    return_lse=False,
    return_attn_probs=False,
):
    assert tuple(window_size) == (-1, -1)
    extras = (dropout_p, None, alibi_slopes, return_attn_probs)
    return tuple(_attention(q, k, v, softmax_scale, causal, return_lse, None, extras))


def without_lse(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """A function that polyattn cannot use."""
    return _bare(_attention(q, k, v, softmax_scale, causal, False, None, (dropout_p,)))


def with_another_lse(q, k, v, softmax_scale=None, causal=False, return_lse=False):
    """A log-sum-exp of another layout, as variable-length functions give it."""
    out, *rest = _attention(q, k, v, softmax_scale, causal, return_lse, None, ())
    return (out, *(each.transpose(0, 1).flatten(1) for each in rest))


def _bare(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)


def _attention(q, k, v, scale, causal, return_lse, rounding, extras):
    assert not any(extras)
    assert rounding in (None, 0, 1, 2)
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert not any(each.requires_grad for each in (q, k, v)) or not torch.is_grad_enabled()
    (batch, queries, heads, head_dim), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    assert k.shape == v.shape == (batch, keys, kv_heads, head_dim)
    assert head_dim <= 256
    assert heads % kv_heads == 0
    assert min(batch, queries, keys) > 0
    for each in (q, k, v):
        assert each.shape[1] * each.stride(1) * each.element_size() < 1 << 32
    calls.append(
        {
            "shapes": (tuple(q.shape), tuple(k.shape)),
            "scale": scale,
            "causal": causal,
            "return_lse": return_lse,
            "rounding": rounding,
            "contiguous": [each.is_contiguous() for each in (q, k, v)],
        }
    )
    dtype, padding = q.dtype, (0, -head_dim % 8)
    q, k, v = (torch.nn.functional.pad(each.float(), padding).transpose(1, 2) for each in (q, k, v))
    k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if causal:
        allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)  # NaN where no key is allowed
    out = (weights @ v).to(dtype).transpose(1, 2).contiguous()[..., :head_dim]
    return [out, scores.logsumexp(-1) + 0 * weights.sum(-1)] if return_lse else [out]
