"""Numbers that are not finite: where they stand, and which dtype has room for them."""

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Whether a floating-point tensor of any shape holds no NaN and no infinity; waits for its device.

    Its least and largest value say so, which makes no copy; either is NaN where one element is.
    """
    if x.dtype.itemsize == 1:
        x = x.to(torch.float16)  # which has every number of one byte, and the operations that those lack
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def first_not_finite(x: Tensor) -> tuple[list[int], float]:
    """Index and value of the first element that is NaN or infinite; x has one."""
    index = torch.nonzero(~torch.isfinite(x))[0].tolist()
    return index, float(x[tuple(index)])


def dtype_remedy(dtype: torch.dtype) -> str:
    """What to do about a model whose values left the range of `dtype`."""
    if dtype == torch.float16:
        return "float16 ends at 65504: set model.dtype=bfloat16 (or float32)"
    if dtype == torch.bfloat16:
        return "set model.dtype=float32, and see whether the unquantised model computes this text"
    return "see whether the unquantised model computes this text; its weights may be damaged"
