"""Learning with quantised weights: grids, codes, and gradients against plain autograd of the straight-through network."""

import dataclasses
import itertools

import pytest
import torch
from test_model import CPU, WeightSide, eager_and_compiled, learning_model, online_sites, relative
from tiny import SHAPES, write_model
from torch import Tensor, nn

from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weight_quant import WeightQuantizer, merged_rows
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.cayley import tangent
from dist_spin.numerics.format_weights import format_codes, format_scales
from dist_spin.numerics.quantizer import STAGED_CLIP, dequantize_weight, quantize_weight, weight_scales

GRIDS = (
    WeightQuantizer(4),
    WeightQuantizer(4, mse_clip=True),
    WeightQuantizer(3, symmetric=False, group_size=8),
    WeightQuantizer(8, symmetric=False),
)


FORMAT_GRIDS = (WeightQuantizer(4, group_size=16, format="nvfp4", mse_clip=True), WeightQuantizer(8, format="fp8"))


APART = ("qwen2, bias of keys apart", GRIDS[0])


def rounded(w: Tensor, grid: WeightQuantizer) -> Tensor:
    """Q(w) by the quantiser's own functions, without packing."""
    if grid.format != "int":
        fitted = {"group_size": grid.group_size, "tensor_scale": None, "norm": 2.4, "search": grid.mse_clip}
        scale = format_scales(w, grid.format, **fitted)
        codes = format_codes(w, scale, grid.format)
        return dequantize_weight(codes, scale, torch.zeros_like(scale), grid.group_size, w.dtype)
    how = {"bits": grid.bits, "symmetric": grid.symmetric, "group_size": grid.group_size}
    scale, zero = weight_scales(w, **how, mse_clip=grid.mse_clip, strides=STAGED_CLIP)
    return dequantize_weight(quantize_weight(w, scale, zero, **how), scale, zero, grid.group_size, w.dtype)


class StraightThrough(WeightSide):
    """The release's `4 4 4`: every weight rotated and rounded in every forward pass, plain autograd around the rounding."""

    def __init__(self, files: ModelFiles, sites: Sites, r1: Tensor, r2: Tensor, grid: WeightQuantizer) -> None:
        super().__init__(files, sites, r1, r2)
        self.grid = grid

    def weights(self, i: int) -> dict[str, Tensor]:
        def through(name: str, w: Tensor) -> Tensor:
            return w + (rounded(w, self.grid) - w).detach() if name.endswith("proj.weight") else w

        return {name: through(name, w) for name, w in super().weights(i).items()}


def fit(model: FakeQuantModel, rotations: Rotations) -> None:
    """What an engine does with shards, on a whole model."""
    for index, role, linear in model.fake_quant_linears():
        r1, r2 = rotations.r1_param.value, rotations.r2_params[index].value
        rows = slice(0, len(linear.weight))
        merged = merged_rows(role.rpartition(".")[2], linear.weight, rows, r1, r2, torch.float64)
        for parameter, found in zip((linear.codes, linear.scale, linear.zero), linear.spec.fit(merged), strict=True):
            if parameter is not None:
                parameter.data.view(found.dtype).copy_(found)


def gridded_model(
    files: ModelFiles, rotations: Rotations, sites: Sites, grid: WeightQuantizer, **more
) -> FakeQuantModel:
    model = learning_model(files, rotations, sites, torch.float64, weight_quantizer=grid, **more)
    fit(model, rotations)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "grid"),
    [*itertools.product(SHAPES, GRIDS), *(("gqa_tied", grid) for grid in FORMAT_GRIDS), APART],
    ids=str,
)
def test_gradients_equal_plain_autograd_of_the_straight_through_network(kind, grid, ids, tmp_path):
    kind, _, apart = kind.partition(", ")
    files = open_model(str(write_model(kind, tmp_path)))
    r1, r2 = initial("hadamard", files.shape, seed=7)
    sites = dataclasses.replace(online_sites(files, 4), k_bias_apart=bool(apart))
    rotations = Rotations(r1, r2, CPU, torch.float64, learn=True, euclidean=True)
    loss = gridded_model(files, rotations, sites, grid)(ids).mean()
    loss.backward()
    oracle = StraightThrough(files, sites, r1, r2, grid)
    oracle_loss = oracle(ids)
    oracle_loss.backward()
    torch.testing.assert_close(loss, oracle_loss, rtol=1e-9, atol=0)
    rotations.to_lie_grad()
    # Off the manifold the final norm sees another network, so what must agree is the gradient along it.
    assert relative(tangent(rotations.lie_grad1), tangent(oracle.r1.grad @ r1.T)) < 1e-9
    assert relative(tangent(rotations.lie_grad2), tangent(oracle.r2.grad @ r2.mT)) < 1e-9
    unrounded = WeightSide(files, sites, r1, r2)(ids)
    assert abs(float(loss - unrounded)) > 1e-4  # the grid really is on


@pytest.mark.parametrize("grid", [*GRIDS, *FORMAT_GRIDS], ids=str)
def test_a_grid_holds_what_the_quantiser_makes(grid):
    w = torch.randn(24, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = grid.fit(w)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape[1] == (24 if grid.bits <= 4 else 48)
    assert torch.equal(grid.weight(found, w), rounded(w, grid))
    assert torch.equal(grid.weight(found, w, for_backward=True), rounded(w, grid))


@pytest.mark.slow
def test_one_compiled_graph_serves_all_layers_and_changes_no_gradient(tmp_path, ids):
    def make(files: ModelFiles, rotations: Rotations, **more) -> FakeQuantModel:
        return gridded_model(files, rotations, online_sites(files, 4), GRIDS[0], **more)

    gradients = eager_and_compiled(tmp_path, ids, make, euclidean=True)
    assert relative(gradients[1], gradients[0]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("grid", [WeightQuantizer(4), WeightQuantizer(8, symmetric=False)], ids=str)
def test_a_compiled_layer_keeps_no_rounded_weight_for_its_backward_pass(grid, tmp_path, ids):
    """What is kept beside parameters must not have the size of a linear: at 70B that was 1.7 GB a layer."""
    files = open_model(str(write_model("mha", tmp_path)))
    rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True, euclidean=True)
    model = gridded_model(files, rotations, online_sites(files, 4), grid, compile=True)
    model.set_levels(["none"] * files.shape.layers)
    torch._dynamo.reset()
    linears = {(len(linear.weight), linear.weight.shape[1]) for _, _, linear in model.fake_quant_linears()}
    stacked = {
        (rows, h) for h in {i for _, i in linears} for rows in (3 * files.shape.hidden, 2 * files.shape.intermediate)
    }
    bases = [rotations.r1_param.value, *(rotations.r2_params[i].value for i in range(files.shape.layers))]
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *bases)}
    kept = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids[:, :23]).sum().backward()
    shapes = linears | stacked | {shape[::-1] for shape in linears | stacked}
    assert kept
    assert not [shape for shape in kept if shape in shapes], kept


def test_learning_with_rounded_weights_lowers_their_loss(tmp_path, ids):
    files = open_model(str(write_model("mha", tmp_path)))
    rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True, euclidean=True)
    model = gridded_model(files, rotations, online_sites(files, 4), WeightQuantizer(3))
    losses = []
    for _ in range(12):
        fit(model, rotations)
        loss = model(ids).mean()
        losses.append(float(loss))
        loss.backward()
        rotations.to_lie_grad()
        for master, lie_grad in ((rotations.r1, rotations.lie_grad1), (rotations.r2, rotations.lie_grad2)):
            direction = tangent(lie_grad)
            master.copy_(torch.linalg.matrix_exp(-0.02 * direction / direction.abs().amax()) @ master)
        rotations.gradient.zero_()
        rotations.refresh()
    assert min(losses[6:]) < losses[0] - 0.02, losses
    assert isinstance(model.head, nn.Module)
