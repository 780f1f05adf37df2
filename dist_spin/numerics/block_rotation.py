"""Products with rotations that are held as their blocks.

A rotation R of n channels is one matrix [b, b] or a stack of blocks [k, b, b], which stand side by side on R's diagonal and are
repeated as often as n is long. So R1 is [h, h] as a whole, [h / b, b, b] in blocks and [b, b] where all blocks are one; R2 is
[d, d] for the heads of a projection, or [d / b, b, b]. Zeros outside of the blocks are never stored or multiplied.
Row-vector convention: y = x R.
"""

import torch
from torch import Tensor


def left_out(r: Tensor) -> bool:
    """Whether a rotation turns nothing: its blocks are single channels, [n, 1, 1], all of them 1."""
    return r.shape[-1] == 1


def matmul_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for operands [m, k], [k, n] or stacks of them, in `dtype`, without rounding the sum to their dtype on the way."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype) if a.dim() == 2 else torch.bmm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def apply_rotation(x: Tensor, r: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x R for x [..., n] and R [b, b] or [k, b, b]; in `dtype`, or in x's; R^T is `r.mT`. Differentiable in both."""
    dtype = dtype or x.dtype
    if r.dim() == 2 and x.shape[-1] == len(r):
        return matmul_wide(x, r, dtype) if x.dim() == 2 else x @ r if dtype == x.dtype else x.to(dtype) @ r.to(dtype)
    rotated = matmul_wide(_by_block(x, r.shape), r, dtype)
    if r.dim() == 2:
        return rotated.reshape(x.shape)
    return rotated.transpose(0, 1).reshape(x.shape)


def apply_rotation_left(r: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """R^T x for x [n, m] and R [b, b] or [k, b, b]; in `dtype`, or in x's."""
    dtype, size = dtype or x.dtype, r.shape[-1]
    if r.dim() == 2 and len(x) == size:
        return matmul_wide(r.T, x, dtype)
    return matmul_wide(all_blocks(r, len(x)).mT, x.unflatten(0, (len(x) // size, size)), dtype).flatten(0, 1)


def rotated_rows(r: Tensor, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of R^T x for x [n, m], in `dtype`: of the blocks, only those that these rows lie in."""
    if r.dim() == 2 and len(x) == len(r):
        return matmul_wide(r[:, rows].T, x, dtype)
    if rows.start >= rows.stop:
        return x.new_empty(0, x.shape[1], dtype=dtype)
    size = r.shape[-1]
    first, last = rows.start // size, -(-rows.stop // size)
    blocks = r if r.dim() == 2 else r[first:last]
    rotated = apply_rotation_left(blocks, x[first * size : last * size], dtype)
    return rotated[rows.start - first * size : rows.stop - first * size]


def rotation_gradient(a: Tensor, c: Tensor, blocks: torch.Size, dtype: torch.dtype) -> Tensor:
    """The blocks [b, b] or [k, b, b] of A^T C for a and c [..., n], summed over R's repetitions, in `dtype`.

    What reaches a rotation of the shape `blocks` from y = x R with its blocks alone: A = x and C the gradient of y.
    """
    return matmul_wide(_by_block(a, blocks).mT, _by_block(c, blocks), dtype)


def _by_block(x: Tensor, blocks: torch.Size) -> Tensor:
    """x [..., n] as [k, rows, b], the channels of each block apart; as [rows, b] for a single block."""
    if len(blocks) == 2:
        return x.reshape(-1, blocks[-1]) if x.numel() else x.new_empty(0, blocks[-1])
    k, b = blocks[0], blocks[-1]
    rows = x.numel() // (k * b)
    return x.reshape(rows, k, b).transpose(0, 1)


def full_rotation(r: Tensor, n: int) -> Tensor:
    """R as one matrix [n, n]; r [b, b] or [k, b, b]."""
    return torch.block_diag(*all_blocks(r, n))


def all_blocks(r: Tensor, n: int) -> Tensor:
    """Every block of R, [n / b, b, b], none left to repetition; r [b, b] or [k, b, b]."""
    stack = r if r.dim() == 3 else r[None]
    return stack.repeat(n // (len(stack) * r.shape[-1]), 1, 1)


def blocks_of(r: Tensor, block: int) -> Tensor:
    """The blocks [n / block, block, block] of a block-diagonal R [n, n].

    Raises:
        ValueError: an entry outside of them is not zero.
    """
    stack = torch.stack([r[i : i + block, i : i + block] for i in range(0, len(r), block)])
    if (outside := float((r - torch.block_diag(*stack)).abs().max())) > 0:
        raise ValueError(f"an entry outside of the blocks of {block} is {outside:.1e}")
    return stack
