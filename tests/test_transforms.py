"""Learned scales and clips: merged they are what was learned, and their gradients are those of plain autograd."""

import dataclasses

import pytest
import torch
from test_model import CPU, ids, merged_logits, online_sites, relative  # noqa: F401 (a fixture)
from tiny import SHAPES, write_model
from torch import Tensor, nn

from dist_spin.model.fake_quant_model import FakeQuantModel, parameter_source
from dist_spin.model.layers import LayerRunner
from dist_spin.model.merge import folded_rows
from dist_spin.model.rotate_quantize import RotationParam, ScaleAndClip, rotate_quantize
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.scales_and_clips import ScalesAndClips, initial_clip
from dist_spin.model.sites_config import CLIP_SITES, Sites
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.cayley import tangent
from dist_spin.numerics.quantizer import QuantSpec, range_quantize


def learned_transforms(files: ModelFiles, *, scales: bool = True, clips: bool = True) -> ScalesAndClips:
    """Scales between about 0.5 and 2 and clips between about 0.6 and 1."""
    norm = "model.layers.0.self_attn.k_norm.weight"
    shared = files.weights.has(norm) and files.weights.row_count(norm) == files.shape.head_dim
    bits = dict.fromkeys(CLIP_SITES, 4)
    transforms = ScalesAndClips(
        files.shape, CPU, torch.float64, scales=scales, clips=clips, shared_keys=shared, bits=bits
    )
    generator = torch.Generator().manual_seed(0)
    transforms.parameters += 0.4 * torch.randn(transforms.parameters.shape, generator=generator, dtype=torch.float64)
    return transforms


def build(
    files: ModelFiles, rotations: Rotations, sites: Sites, transforms: ScalesAndClips, **kwargs
) -> FakeQuantModel:
    model = FakeQuantModel(
        files.config, rotations, sites, device=CPU, dtype=torch.float64, transforms=transforms, **kwargs
    )
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        folded_rows(files.weights, parameter_source(name), parameter.data, 0, () if transforms.scales else sites.r4)
    return model


def merged(
    files: ModelFiles,
    rotations: tuple[Tensor, Tensor],
    sites: Sites,
    values: dict[str, Tensor],
    ids: Tensor,  # noqa: F811
) -> Tensor:
    scales = {name.removeprefix("scale."): s for name, s in values.items() if name != "clip"}
    weights = RotatedWeights(files.weights, files.shape, rotations, sites.r4, CPU, torch.float64, scales=scales)
    sites = dataclasses.replace(sites, clips=values.get("clip"))
    runner = LayerRunner(files.config, sites, device=CPU, dtype=torch.float64, rotated=True)
    hidden = weights.embedding()[ids]
    for i in range(files.shape.layers):
        hidden = runner.run(runner.build(i, weights.layer(i)), i, hidden)
    return weights.head(files.config.rms_norm_eps).logits(hidden)


@pytest.fixture(params=SHAPES)
def files(request, tmp_path) -> ModelFiles:
    return open_model(str(write_model(request.param, tmp_path)))


@pytest.mark.parametrize("bits", [4, 16])
def test_attach_equals_merge(files, ids, bits):  # noqa: F811
    rotations = initial("hadamard", files.shape, seed=5)
    sites, transforms = online_sites(files, bits), learned_transforms(files)
    model = build(files, Rotations(*rotations, CPU, torch.float64, learn=True), sites, transforms)
    with torch.no_grad():
        attached = model(ids)
    logits = merged(files, rotations, sites, transforms.values(), ids)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(attached, loss.view(2, -1).mean(-1), rtol=1e-9, atol=0)
    untouched = merged_logits(files, rotations, sites, ids, torch.float64)
    if bits == 16:  # merging scales changes no function
        assert relative(logits, untouched) < 1e-9
    else:
        assert relative(logits, untouched) > 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
def test_site_gradients_are_those_of_plain_autograd(symmetric):
    g = torch.Generator().manual_seed(0)
    n = 24
    x, w = torch.randn(40, n, generator=g, dtype=torch.float64), torch.randn(16, n, generator=g, dtype=torch.float64)
    r = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    scale = (0.3 * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()
    clip = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    out_gradient, spec = torch.randn(40, 16, generator=g, dtype=torch.float64), QuantSpec(4, symmetric)
    lie_grad, site_x = torch.zeros_like(r).requires_grad_(), x.clone().requires_grad_()
    site = rotate_quantize(site_x, RotationParam(r, lie_grad), spec, ScaleAndClip(scale, clip)) @ w.T
    site.backward(out_gradient)
    oracle_scale, oracle_clip = scale.detach().clone().requires_grad_(), clip.detach().clone().requires_grad_()
    oracle = plain_quantize((x @ r) * oracle_scale.exp(), oracle_clip.sigmoid(), symmetric) / oracle_scale.exp()
    plain = oracle @ (w @ r).T
    plain.backward(out_gradient)
    torch.testing.assert_close(site, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale.grad, oracle_scale.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(clip.grad, oracle_clip.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(site_x.grad, out_gradient @ w)  # straight-through
    # What the rotation gets: e = Q(z)/s - x R held constant.
    moved = (oracle.detach() @ r.T) - x
    torch.testing.assert_close(tangent(lie_grad.grad), tangent((out_gradient @ w).T @ moved), rtol=1e-9, atol=1e-12)


def plain_quantize(z: Tensor, ratio: Tensor, symmetric: bool, steps: float = 7) -> Tensor:
    """4 bits per row in plain autograd, rounding straight-through, clamping as the minimum of bounds."""

    def rounded(v: Tensor) -> Tensor:
        return v + (v.round() - v).detach()

    if symmetric:
        scale = z.abs().amax(-1, keepdim=True) * ratio / steps
        return rounded(z / scale).clamp(-8, 7) * scale
    low, high = z.amin(-1, keepdim=True).clamp(max=0) * ratio, z.amax(-1, keepdim=True).clamp(min=0) * ratio
    scale = (high - low) / 15
    zero = rounded(-low / scale)
    return (rounded(z / scale) + zero).clamp(0, 15).sub(zero) * scale


@pytest.mark.parametrize(("symmetric", "half_steps"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("group", [0, 8])
def test_range_gradients_are_those_of_plain_autograd(symmetric, half_steps, group):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 24, generator=g, dtype=torch.float64)
    x[3] = x[3].abs()  # a range that 0 bounds
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ratios = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    out = range_quantize(ours, QuantSpec(4, symmetric, group, clip_ratio=0.9, half_steps=half_steps), ratios[0])
    steps = 7.5 if half_steps else 7
    plain = plain_quantize(theirs.view(30, -1, group or 24), 0.9 * ratios[1], symmetric, steps).view(30, 24)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn(30, 24, generator=g, dtype=torch.float64)
    (out * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ratios[0].grad, ratios[1].grad, rtol=1e-9, atol=1e-12)


def test_the_teacher_is_the_full_precision_network(files, ids):  # noqa: F811
    rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True)
    for scales in (False, True):  # without scales R4 is folded, and the teacher has to meet it
        transforms = learned_transforms(files, scales=scales)
        off = build(files, rotations, online_sites(files, 16), transforms, teacher_share=1.0)
        assert float(off(ids).detach().abs().max()) < 1e-12  # nothing is quantised, so nothing diverges
        on = build(files, rotations, online_sites(files, 4), transforms, teacher_share=1.0)
        student = merged(files, initial("hadamard", files.shape, 0), online_sites(files, 4), transforms.values(), ids)
        teacher = merged_logits(files, None, Sites(), ids, torch.float64)
        p, q = (logits[:, :-1].log_softmax(-1) for logits in (teacher, student))
        divergence = (p.exp() * (p - q)).sum(-1).mean(-1)
        torch.testing.assert_close(on(ids).detach(), divergence, rtol=1e-8, atol=0)


def test_learned_parameters_get_gradients_of_the_whole_network(files, ids):  # noqa: F811
    rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True)
    transforms = learned_transforms(files)
    model = build(files, rotations, online_sites(files, 4), transforms, teacher_share=0.5)
    model(ids).sum().backward()
    for name, gradient in transforms.named(transforms.gradient).items():
        assert gradient.isfinite().all(), name
        assert (gradient != 0).any(-1).all(), name  # every layer, every head


@pytest.mark.slow
def test_two_compiled_graphs_serve_all_layers_and_their_teacher(tmp_path, ids):  # noqa: F811
    files = open_model(str(write_model("gqa_tied", tmp_path, layers=12)))
    gradients = []
    for compiled in (False, True):
        rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True)
        transforms = learned_transforms(files)
        model = build(files, rotations, online_sites(files, 8), transforms, teacher_share=1.0, compile=compiled)
        model.set_levels(["sites"] * 12)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model(ids).sum().backward()
        gradients.append(torch.cat((tangent(rotations.lie_grad1).flatten(), transforms.gradient)))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert relative(gradients[1], gradients[0]) < 1e-9


def test_stored_scales_and_clips_are_what_learning_continues_from(tmp_path):
    files = open_model(str(write_model("gqa_tied", tmp_path)))
    first, second = learned_transforms(files), learned_transforms(files, clips=False)
    second.start_from(first.values())
    for name, values in second.values().items():
        torch.testing.assert_close(values, first.values()[name], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="not \\[2, 48\\]"):
        second.start_from({"scale.input_layernorm": torch.ones(2, 47)})


def test_clips_start_where_they_hardly_cost_anything_at_their_bits(tmp_path):
    """Against quantisers that clip nothing: at 4 bits the start is better on heavy tails, at 8 it is no worse."""
    files = open_model(str(write_model("gqa_tied", tmp_path)))
    bits = {"attention": 4, "o": 4, "mlp": 8, "down": 16, "k": 3, "v": 6}
    transforms = ScalesAndClips(files.shape, CPU, torch.float64, scales=False, clips=True, shared_keys=False, bits=bits)
    expected = torch.tensor([0.95, 0.95, 1 - 0.05 / 256, 1 - 0.05 / 256, 0.95, 1 - 0.05 / 16], dtype=torch.float64)
    torch.testing.assert_close(transforms.values()["clip"], expected.expand(2, 6))
    x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for width, most in ((4, 0.97), (6, 1.0), (8, 1.001)):
        kept, whole = (
            float((range_quantize(x, QuantSpec(width), torch.tensor(ratio)) - x).square().mean())
            for ratio in (initial_clip(width), 1.0)
        )
        assert kept < most * whole, width
