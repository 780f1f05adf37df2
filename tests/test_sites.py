"""Attached and merged sites see the same numbers in fp32, where a whole network cannot be compared: flipped codes cascade."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

from dist_spin.compare.methods.transformed_layer import TransformedInputQuant, TransformedKey
from dist_spin.config.loader import load_config
from dist_spin.model.fake_quant_model import FakeQuantModel, parameter_source
from dist_spin.model.layers import LayerRunner
from dist_spin.model.merge import folded_rows
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites import KeySite, plain_sites
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.quant_sites import tell_key_bias
from dist_spin.runtime.console import Console, shown_on

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


def test_a_bias_apart_leaves_4_bits_to_what_depends_on_the_token(tmp_path):
    """Keys of a bias a hundred times as large: quantised with it, attention sees next to nothing of the tokens."""
    files = open_model(str(write_model("qwen2", tmp_path, dtype=torch.float64)), dtype=torch.float64)
    shape, weights = files.shape, RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float64)
    head = QuantSpec(4, group_size=shape.head_dim)
    r3 = kronecker_factors(shape.head_dim, 0, dtype=torch.float64, device="cpu")
    layer = weights.layer(0)
    layer["self_attn.k_proj.bias"] = layer["self_attn.k_proj.bias"] * 100
    x = torch.randn(2, 16, shape.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def through(sites: Sites, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        runner = LayerRunner(files.config, sites, device=CPU, dtype=torch.float64, rotated=False)
        return runner.run(runner.build(0, parameters), 0, x)

    exact, inside, apart = (
        through(sites, layer) for sites in (Sites(), Sites(k=head, r3=r3), Sites(k=head, r3=r3, k_bias_apart=True))
    )
    assert (apart - exact).abs().max() > 1e-4
    assert (apart - exact).norm() < 0.1 * (inside - exact).norm()
    assert torch.equal(through(Sites(k_bias_apart=True), layer), exact)  # nothing is quantised
    with torch.no_grad(), plain_sites():
        torch.testing.assert_close(through(Sites(k=head, r3=r3, k_bias_apart=True), layer), exact)
    # The same keys as a model has whose bias is 0, but for the bias.
    q, k, b = (torch.randn(2, n, 16, shape.head_dim, dtype=torch.float64) for n in (4, 2, 2))
    for site in (KeySite, lambda spec, **more: TransformedKey(TransformedInputQuant(spec, {}, "key"), {}, **more)):
        together, alone = site(head, bias_apart=True)(q, torch.cat((k, b), 1)), site(head)(q, k)
        assert torch.equal(together[1], alone[1] + b)
        assert torch.equal(together[0], alone[0])


@pytest.mark.parametrize(("factor", "words", "said"), [(1, [], 0), (100, [], 1), (100, ["quant.k_bits=16"], 0)])
def test_a_large_bias_of_keys_is_told(factor, words, said, tmp_path, capfd):
    write_model("qwen2", tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.bias"
    tensors[name] = tensors[name] / tensors[name].abs().max() * factor
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    words = [f"model.path={tmp_path}", "model.dtype=float32", *words]
    files = open_model(str(tmp_path), dtype=torch.float32)
    with shown_on(Console(sys.stderr)):
        tell_key_bias(load_config(None, words), files)
        tell_key_bias(load_config(None, [*words, "quant.k_bias_apart=true"]), files)
    assert "".join(capfd.readouterr()).count("k_proj has biases of up to 100") == said
