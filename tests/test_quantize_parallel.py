"""Whether ranks share each layer or take whole ranges of layers, and which ranges each takes."""

from dataclasses import replace

import pytest

from dist_spin.config.quantize import QuantizeConfig
from dist_spin.model.architecture import Shape
from dist_spin.quantize.parallel import Choice, assign, choose, layer_cost, memory_needed

LLAMA_70B = Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, layers=80, vocab=128256)
QWEN3_30B = Shape(2048, 768, 32, 4, 128, 48, 151936, experts=128, experts_per_token=8)
COST = layer_cost(LLAMA_70B, 128 * 2048)


def chosen(missing: list[int], *, setting="auto", states_to=60, sequences=128, ranks=4, fits=True) -> Choice:
    return choose(setting, COST, missing, states_to, sequences, ranks, fits=fits)


def test_the_estimate_is_what_a_70b_layer_was_measured_to_take_on_one_h200():
    assert COST.forward == pytest.approx(0.812, rel=0.1)
    assert COST.split == pytest.approx(0.526 + 0.591 + 0.227, rel=0.1)
    assert COST.whole == pytest.approx(0.484 + 0.327, rel=0.1)
    assert 38e9 < memory_needed(LLAMA_70B, 128 * 2048, 2) < 46e9  # 34.7 GiB were measured


def test_experts_count_with_the_tokens_that_choose_them():
    dense, sparse = (layer_cost(shape, 8192) for shape in (replace(QWEN3_30B, experts_per_token=128), QWEN3_30B))
    assert dense.whole == sparse.whole
    assert dense.forward > 5 * sparse.forward
    weights = 128 * 3 * 2048 * 768 + 2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128
    assert memory_needed(QWEN3_30B, 0, 2) == pytest.approx((8 + 3 * 2) * weights, rel=0.05)


def test_ranks_take_whole_ranges_where_there_are_enough_and_share_layers_where_not():
    assert chosen([20] * 4) == Choice("layers", "about 1.7 times as fast as sharing each layer")
    assert chosen([10] * 8).parallel == "layers"
    assert choose("auto", layer_cost(QWEN3_30B, 128 * 2048), [12] * 4, 36, 128, 4, fits=True).parallel == "layers"
    assert chosen([40] * 2, ranks=8).parallel == "ranks"
    assert "times as fast as whole ranges" in chosen([40] * 2, ranks=8).reason
    assert chosen([1] * 2, ranks=2).parallel == "layers"  # a rest of two layers
    assert "quantize.layers_per_job" in chosen([80], states_to=0).reason
    assert "does not hold all calibration sequences" in chosen([20] * 4, fits=False).reason


def test_a_setting_overrides_the_estimate_where_there_is_a_choice():
    assert chosen([20] * 4, setting="ranks") == Choice("ranks", "quantize.parallel says so")
    assert chosen([40] * 2, ranks=8, setting="layers").parallel == "layers"
    assert chosen([20] * 4, setting="layers", fits=False).parallel == "layers"
    assert chosen([80], setting="layers").parallel == "ranks"
    assert QuantizeConfig().parallel == "auto"


def test_ranges_are_shared_out_evenly():
    assert assign([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert assign([1, 7, 2, 4], 2) == [[1], [3, 2, 0]]
    assert assign([3], 4) == [[0], [], [], []]
