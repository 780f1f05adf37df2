"""Which dtype sums and solves run in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are summed, solved and learned in: fp32 for half precision and fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
