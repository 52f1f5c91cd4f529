"""Stands in for sageattention 1.0.6: its one dense function, right numbers, and its defects.

No ``**kwargs``: the vendor swallows what it does not know, and a caller must not rely on that.
"""

import torch
import torch.nn.functional as F

CALLS = []
BLOCK = 64


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
    CALLS.append({"k": k, "v": v, "smooth_k": smooth_k})
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.dtype == k.dtype == v.dtype
    assert q.size(-1) in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    sequence = 1 if tensor_layout == "NHD" else 2
    if smooth_k:
        k -= k.mean(dim=sequence, keepdim=True)  # overwrites the caller's tensor
    out = torch.empty(q.shape, dtype=q.dtype)
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    v = v.half().float()
    scores = q.float() @ k.float().transpose(-1, -2) * (sm_scale or q.shape[-1] ** -0.5)
    if is_causal:
        assert q.shape[2] == k.shape[2], "qo_len and kv_len must be equal for causal attention"
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -float("inf")
        )
    else:
        # The slots after the last key count as keys of logit 0 and value 0.
        empty = -k.shape[2] % BLOCK
        scores, v = F.pad(scores, (0, empty)), F.pad(v, (0, 0, 0, empty))
    result = scores.softmax(-1) @ v
    return out.copy_(result.transpose(1, 2) if tensor_layout == "NHD" else result)
