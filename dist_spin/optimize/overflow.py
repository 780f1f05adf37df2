"""Names the first layer whose output is not finite, when the loss is not finite before the first step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dist_spin.errors import NumericsError
from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.numerics.finite import dtype_remedy
from dist_spin.runtime.distributed import sum_over_ranks_


@torch.no_grad()
def first_overflowing_layer(model: FakeQuantModel, batches: Iterable[Tensor]) -> int | None:
    """The first decoder layer whose output is not finite on any rank, None where all are; every rank calls it.

    Args:
        batches: token ids [micro, T], as many on every rank.
    """
    counts = torch.zeros(len(model.layers), dtype=torch.float64)

    def count(index: int) -> Any:
        def hook(module: Any, arguments: Any, output: tuple[Tensor, Tensor | None]) -> None:
            counts[index] += float((~torch.isfinite(output[0])).sum())

        return hook

    handles = [layer.register_forward_hook(count(index)) for index, layer in enumerate(model.layers)]
    try:
        for ids in batches:
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    overflowing = sum_over_ranks_(counts).nonzero().flatten().tolist()
    return overflowing[0] if overflowing else None


def overflow_at_start(
    model: FakeQuantModel, batches: Iterable[Tensor], dtype: torch.dtype, observed: str
) -> NumericsError:
    """The error for a loss or gradient that is not finite before a step was taken; every rank calls it.

    Args:
        batches: as for `first_overflowing_layer`. observed: loss and gradient norm, in words.
    """
    layer = first_overflowing_layer(model, batches)
    format_name = str(dtype).removeprefix("torch.")
    where = "the gradient or the loss" if layer is None else f"the output of layer {layer}"
    return NumericsError(
        f"before the first step, {where} is not finite in {format_name} ({observed})", dtype_remedy(dtype)
    )
