"""Stands in for sageattn3 1.0.0: [B, H, S, D] only, a fixed scale, k overwritten in place.

No ``**kwargs``: the vendor swallows what it does not know, and a caller must not rely on that.
"""

import torch
import torch.nn.functional as F

CALLS = []


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
    assert attn_mask is None, "the vendor drops masks"
    assert q.size(-1) in (64, 128), "256 and more prints and runs torch's own attention"
    assert q.shape[1] == k.shape[1], "We do not support MQA/GQA yet"
    assert q.dtype in (torch.float16, torch.bfloat16)
    CALLS.append({"k": k, "per_block_mean": per_block_mean})
    length, keys, scale = q.size(2), k.size(2), q.size(-1) ** -0.5
    k -= k.mean(dim=-2, keepdim=True)
    q, k, v = (F.pad(x, (0, 0, 0, -x.size(2) % 128)) for x in (q, k, v))
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    scores[..., keys:] = -float("inf")
    if is_causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -float("inf")
        )
    return (scores.softmax(-1) @ v.float()).to(q.dtype)[:, :, :length].contiguous()
