"""The assembled transformers model: the same bits as the layer-wise one, and a cache that does not change them."""

import pytest
import torch
from tiny import write_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dist_spin.model.full_model import build_full_model
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec

CPU = torch.device("cpu")


def sites_of(files: ModelFiles, online: bool) -> Sites:
    """4-bit keys and values, 8-bit activations."""
    d = files.shape.head_dim
    r3, r4 = (kronecker_factors(n, 0, dtype=torch.float64, device="cpu") for n in (d, files.shape.intermediate))
    head, token = QuantSpec(4, group_size=d), QuantSpec(8)
    return Sites(token, token, head, head, r3 if online else (), r4 if online else ())


def parts(files: ModelFiles, rotated: bool, dtype: torch.dtype) -> tuple[Sites, RotatedWeights]:
    sites = sites_of(files, rotated)
    rotations = initial("orthogonal", files.shape, seed=3) if rotated else None
    return sites, RotatedWeights(files.weights, files.shape, rotations, sites.r4, CPU, dtype)


def load_full_model(files: ModelFiles, rotated: bool, dtype: torch.dtype):
    sites, weights = parts(files, rotated, dtype)
    return build_full_model(
        files.config,
        sites,
        layer=weights.layer,
        embedding=weights.embedding(),
        head=weights.head_weight(),
        final_gain=weights.final_gain(),
        rotated=rotated,
        device=CPU,
        dtype=dtype,
    )


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("kind", ["biases", "gqa_tied", "mistral_window", "qwen2", "qwen3"])
def test_the_assembled_model_has_the_bits_of_the_layer_wise_one(tmp_path, ids, kind, rotated, dtype):
    files = open_model(str(write_model(kind, tmp_path, dtype=dtype)))
    sites, weights = parts(files, rotated, dtype)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=dtype, rotated=rotated)
    hidden = weights.embedding()[ids]
    for i in range(files.shape.layers):
        hidden = runner.run(runner.build(i, weights.layer(i)), i, hidden)
    expected = weights.head(files.config.rms_norm_eps).logits(hidden)
    model = load_full_model(files, rotated, dtype)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, rtol=0, atol=0)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["gqa_tied", "mistral_window", "qwen3"])
def test_logits_and_generation_do_not_depend_on_the_cache(tmp_path, ids, kind):
    files = open_model(str(write_model(kind, tmp_path)), dtype=torch.float64)
    model = load_full_model(files, True, torch.float64)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
            pieces = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 5, 8], dim=1)]
            # Softmax and norms of other lengths sum in another order; a key quantised twice would differ by far more.
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    padded = torch.cat([torch.zeros_like(ids[:1]), ids[:1]], 1), torch.cat([ids[:1], ids[1:]], 1)
    both = torch.cat(padded)
    mask = torch.ones_like(both)
    mask[0, :24] = 0
    written = {
        cached: model.generate(both, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=cached)
        for cached in (True, False)
    }
    assert torch.equal(written[True], written[False])
    alone = model.generate(ids[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(written[True][:1, 48:], alone[:, 24:])
