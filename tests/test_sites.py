"""Attached and merged sites see the same numbers in fp32, where a whole network cannot be compared: flipped codes cascade."""

import pytest
import torch
from tiny import write_model

from dist_spin.model.fake_quant_model import FakeQuantModel, parameter_source
from dist_spin.model.layers import LayerRunner
from dist_spin.model.merge import folded_rows
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["gqa_tied", "biases", "qwen3"])
def test_every_site_is_equal_on_equal_inputs_in_fp32(kind, tmp_path):
    files = open_model(str(write_model(kind, tmp_path, dtype=torch.float32)), dtype=torch.float32)
    shape = files.shape
    d = shape.head_dim
    r3, r4 = (kronecker_factors(n, 0, dtype=torch.float64, device="cpu") for n in (d, shape.intermediate))
    head = QuantSpec(4, group_size=d)
    sites = Sites(QuantSpec(4), QuantSpec(4), head, head, r3, r4)
    r1, r2 = initial("hadamard", shape, seed=1)

    learning = FakeQuantModel(
        files.config, Rotations(r1, r2, CPU, torch.float32), sites, device=CPU, dtype=torch.float32
    )
    learning.to_empty(device="cpu")
    for name, parameter in learning.named_parameters():
        folded_rows(files.weights, parameter_source(name), parameter.data, 0, sites.r4)
    attached = learning.layers[0].layer
    weights = RotatedWeights(files.weights, shape, (r1, r2), sites.r4, CPU, torch.float32)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=torch.float32, rotated=True)
    merged = runner.build(0, weights.layer(0))

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, shape.hidden, generator=g)
    turned = x @ r1.float()
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        for norm, linears in (
            ("input_layernorm", ("q_proj", "k_proj")),
            ("post_attention_layernorm", ("gate_proj", "up_proj")),
        ):
            ours, theirs = getattr(attached, norm)(x), getattr(merged, norm)(turned)
            torch.testing.assert_close(ours @ r1.float(), theirs, **close)
            for linear in linears:
                owner = "self_attn" if linear in ("q_proj", "k_proj") else "mlp"
                pair = (getattr(getattr(model, owner), linear) for model in (attached, merged))
                left, right = (module(value) for module, value in zip(pair, (ours, theirs), strict=True))
                torch.testing.assert_close(left, right, **close)
        normed, turned_normed = attached.input_layernorm(x), merged.input_layernorm(turned)
        values = attached.self_attn.v_proj(normed)
        torch.testing.assert_close(values, merged.self_attn.v_proj(turned_normed), **close)
        mixed = torch.randn(2, 16, shape.heads * d, generator=g)  # what attention makes of the values
        output = attached.self_attn.o_proj(mixed)
        torch.testing.assert_close(output @ r1.float(), merged.self_attn.o_proj(mixed), **close)
        m = torch.randn(2, 16, shape.intermediate, generator=g)
        torch.testing.assert_close(attached.mlp.down_proj(m) @ r1.float(), merged.mlp.down_proj(m), **close)
        q, k = torch.randn(2, 4, 16, d, generator=g), torch.randn(2, 2, 16, d, generator=g)
        for ours, theirs in zip(attached.self_attn.key_site(q, k), merged.self_attn.key_site(q, k), strict=True):
            assert torch.equal(ours, theirs)
