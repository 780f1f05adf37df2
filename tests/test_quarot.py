"""QuaRot's network against what its definition gives by hand: rotations, weights, the online step, clip ratios."""

import pytest
import torch
from test_model import reference_logits, relative
from tiny import SHAPES, write_model

from dist_spin.config.model import ModelConfig
from dist_spin.config.presets import resolve_clips, resolve_presets
from dist_spin.config.quant import QuantConfig
from dist_spin.config.rotation import RotationConfig
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.layers import LayerRunner
from dist_spin.model.sites import OProjInputQuant, across_heads
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.hadamard import hadamard_matrix
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.variants import Variant, build_variant

CPU = torch.device("cpu")


def quarot(files: ModelFiles, bits: int = 16, clips: str = "none", seed: int = 3) -> Variant:
    quant = QuantConfig(a_bits=bits, k_bits=bits, v_bits=bits, clips=clips)
    config = RunConfig(model=ModelConfig("unused", dtype="float64"), rotation=RotationConfig(seed=seed), quant=quant)
    return build_variant(resolve_presets(config), files, "quarot", CPU)


def logits(files: ModelFiles, variant: Variant, ids: torch.Tensor) -> torch.Tensor:
    runner = LayerRunner(files.config, variant.sites, device=CPU, dtype=torch.float64, rotated=True)
    hidden = variant.weights.embedding()[ids]
    for i in range(files.shape.layers):
        hidden = runner.run(runner.build(i, variant.weights.layer(i)), i, hidden)
    return variant.weights.head(files.config.rms_norm_eps).logits(hidden)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_function_is_preserved_at_16_bits(kind, tmp_path):
    files = open_model(str(write_model(kind, tmp_path)))
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    variant = quarot(files)
    assert variant.sites.heads
    reference = reference_logits(files, ids, torch.float64)
    assert relative(logits(files, variant, ids), reference) < 1e-9
    # The step across heads is really there: without it the weights belong to another network.
    variant.sites = sites_for(RunConfig(model=ModelConfig("unused")), files.shape)
    assert relative(logits(files, variant, ids), reference) > 1e-2


def test_the_weights_are_those_of_the_definition(tmp_path):
    files = open_model(str(write_model("mha", tmp_path)))
    variant, shape = quarot(files), files.shape
    assert (shape.hidden, shape.heads, shape.head_dim) == (48, 4, 12)
    assert variant.rotations is not None
    r1, r2 = variant.rotations
    h12 = hadamard_matrix(12).double() / 12**0.5
    h4 = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    assert all(torch.allclose(r, h12) for r in r2)
    signs = (r1 * 48**0.5) @ hadamard_matrix(48).double().T / 48  # R1 = diag(signs) H / sqrt(48)
    torch.testing.assert_close(signs, torch.diag(signs.diagonal().sign()), atol=1e-12, rtol=0)
    assert 0 < int((signs.diagonal() < 0).sum()) < 48
    raw = {name: files.weights.rows(f"model.layers.1.self_attn.{name}_proj.weight") for name in "vo"}
    gain = files.weights.rows("model.layers.1.input_layernorm.weight")
    merged = variant.weights.layer(1)
    # y = x W^T everywhere: o_proj reads a (H4 (x) H12) where it read a, v_proj leaves v (I (x) H12).
    torch.testing.assert_close(merged["self_attn.o_proj.weight"], r1.T @ raw["o"] @ torch.kron(h4, h12))
    v = torch.kron(torch.eye(4, dtype=torch.float64), h12).T @ (raw["v"] * gain) @ r1
    torch.testing.assert_close(merged["self_attn.v_proj.weight"], v)


def test_the_step_across_heads_by_hand():
    x = torch.zeros(1, 12, dtype=torch.float64)  # 4 heads of 3 channels; channel 2 of head 1 is 6
    x[0, 5] = 6
    wanted = torch.zeros(4, 3, dtype=torch.float64)
    wanted[:, 2] = torch.tensor([3, -3, 3, -3])  # row 1 of H4 / 2, times 6
    h4 = kronecker_factors(4, dtype=torch.float64)
    assert torch.equal(across_heads(x, h4, 3), wanted.view(1, 12))
    # Quantised after the step, in one range per token: 2 bits symmetric, codes -2 ... 1, scale 3.
    input_quant = OProjInputQuant(QuantSpec(2, symmetric=True), 3, None, h4)
    assert torch.equal(input_quant(x), wanted.view(1, 12))
    assert OProjInputQuant(QuantSpec(2, symmetric=True), 3, None)(x)[0, 5] == 6


def test_heads_without_a_hadamard_are_mixed_in_blocks(tmp_path, monkeypatch):
    for heads, mixed in ((3, 0), (6, 2)):  # there is none of order 3 or 6; 6 has blocks of 2
        monkeypatch.setattr(SHAPES["mha"], "num_attention_heads", heads)
        monkeypatch.setattr(SHAPES["mha"], "num_key_value_heads", heads)
        monkeypatch.setattr(SHAPES["mha"], "head_dim", 16)
        files = open_model(str(write_model("mha", tmp_path / str(heads))))
        variant = quarot(files)
        assert [len(f) for f in variant.sites.heads] == [mixed] * bool(mixed)
        ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))
        assert relative(logits(files, variant, ids), reference_logits(files, ids, torch.float64)) < 1e-9


def test_the_clip_preset(tmp_path):
    clipped = resolve_clips(QuantConfig(clips="quarot"))
    assert (clipped.a_clip_ratio, clipped.k_clip_ratio, clipped.v_clip_ratio) == (0.9, 0.95, 0.95)
    assert QuantConfig().a_clip_ratio == 1
    with pytest.raises(UserError, match=r"a_clip_ratio is 0\.8"):
        QuantConfig(clips="quarot", a_clip_ratio=0.8)
    files = open_model(str(write_model("mha", tmp_path)))
    sites = quarot(files, 4, "quarot").sites
    assert [spec.clip_ratio for spec in (sites.a, sites.o, sites.k, sites.v)] == [0.9, 0.9, 0.95, 0.95]
    # 0 ... 15 in 4 bits is exact; at 0.9 the scale is 13.5 / 15 and 15 is cut to 13.5.
    x = torch.arange(16.0).repeat(3, 1)
    assert torch.equal(fake_quantize(x, QuantSpec(4)), x)
    torch.testing.assert_close(fake_quantize(x, sites.a).max(), torch.tensor(13.5))
