"""Rows of a weight in tiles of `ROW_TILE`: how they lie in memory, are split over ranks, and meet a product.

A tile's rows are always worked on together, and every product is with exactly one tile, so that its rounding does not depend on
which tiles come with it. Leading dimensions, such as experts, are carried along.
"""

from itertools import pairwise

import torch
from torch import Tensor

from dist_spin.numerics.quantizer import ROW_TILE

GPU_TILES = 8  # tiles in one batched product; the last batch is filled up, so that the same kernel does every batch


def split_rows(rows: int, parts: int) -> list[tuple[int, int]]:
    """Ranges (start, stop) that share `rows` among `parts` at multiples of `ROW_TILE`; empty ones if rows are few."""
    tiles = -(-rows // ROW_TILE)
    bounds = [min(rows, ROW_TILE * (tiles * part // parts)) for part in range(parts + 1)]
    return list(pairwise(bounds))


def whole_batches(x: Tensor, value: float = 0.0) -> Tensor:
    """x [..., rows, n] with rows of `value` up to a multiple of what one (batched) product takes."""
    batch = ROW_TILE * GPU_TILES if x.is_cuda else ROW_TILE
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % batch), value=value)


def tiled(x: Tensor) -> Tensor:
    """[..., tiles * ROW_TILE, n] to [..., tiles, n, ROW_TILE]: a column of a tile lies together in memory."""
    return x.unflatten(-2, (-1, ROW_TILE)).transpose(-1, -2).contiguous()


def untiled(x: Tensor) -> Tensor:
    """Inverse of `tiled`."""
    return x.transpose(-1, -2).flatten(-3, -2)


def propagate_error(tiles: Tensor, feedback: Tensor, residual: Tensor) -> None:
    """Subtract products, such as a block's errors from later columns: tiles [T, n, R] -= feedback [n, B] @ residual [T, B, R].

    Every tile meets a product of one shape, whichever tiles come with it, so its rounding does not depend on the others.
    """
    if not tiles.is_cuda:
        for tile, error in zip(tiles, residual, strict=True):
            tile.addmm_(feedback, error, alpha=-1)
        return
    if not tiles.numel():
        return
    shared = feedback.expand(GPU_TILES, -1, -1)
    for batch, batch_residual in zip(tiles.split(GPU_TILES), residual.split(GPU_TILES), strict=True):
        batch.baddbmm_(shared, batch_residual, alpha=-1)
