"""What does the model ask for, and who answers?

Generated from book/model/operators.py; edit the chapter, not this file.
"""

import torch
from torch import Tensor

# --- How is the norm rounded once? -------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension: (…, D) -> (…, D).

    Computed in fp32 (float64 for float64) and rounded ONCE, at the end, to
    x.dtype: the weight is multiplied before the rounding. The order is that
    of transformers' GptOssRMSNorm.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * wide).to(x.dtype)


__all__ = [
    "rms_norm",
]
