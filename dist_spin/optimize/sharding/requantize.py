"""Quantise sharded weights anew under the rotations as they are: once per optimiser step, each rank its own rows."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations
from dist_spin.model.weight_quant import merged_rows

MIXED = ("v_proj", "o_proj", "down_proj")  # R1 or R2 mixes the rows of these, so each is gathered, one at a time


@torch.no_grad()
def requantize_weights(model: FakeQuantModel, rotations: Rotations) -> None:
    """Q(merge(W, R)) for every fake-quantised linear of a sharded model, in place; all ranks must call it."""
    r1 = rotations.r1_param.value
    for index, role, linear in model.fake_quant_linears():
        role, r2 = role.rpartition(".")[2], rotations.r2_params[index].value
        weight = _sharded(linear.weight)
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        rows = slice(offset[0], offset[0] + shape[0])
        folded = weight.to_local().to(model.device)  # from the host, if the layer is offloaded
        if role in MIXED:
            on_device = DTensor.from_local(
                folded, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
            )
            folded = on_device.full_tensor()
        if not shape[0]:
            continue
        merged = merged_rows(role, folded if role in MIXED else folded[: shape[0]], rows, r1, r2, linear.scale.dtype)
        for parameter, fitted in zip((linear.codes, linear.scale, linear.zero), linear.spec.fit(merged), strict=True):
            if parameter is not None and fitted is not None:
                local = _sharded(parameter).to_local()[: shape[0]]
                local.view(fitted.dtype).copy_(fitted)


def _sharded(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor), "weights are quantised between steps, while they are sharded"
    return parameter
