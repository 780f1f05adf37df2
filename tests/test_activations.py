"""Activation figures by hand, and the pass over a model against transformers' own forward pass."""

import math

import pytest
import torch
from tiny import tiny_run
from transformers import AutoModelForCausalLM

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted
from dist_spin.numerics.activations import SUMMARY, kurtosis, peak_over_rms, pooled, summary
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import build_variant, calibration_tokens
from dist_spin.report.measure_activations import _measure
from dist_spin.runtime.distributed import start, stop
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.activation_stats import SITES, load_statistics, statistics_path
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import load_tensors


def test_figures_of_known_tokens():
    n = 400
    spike, flat = torch.zeros(n), torch.ones(n)
    spike[7] = -3.0
    alternating = torch.tensor([1.0, -1.0]).repeat(n // 2)
    gaussian = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([spike, flat, alternating, torch.zeros(n)])
    assert peak_over_rms(tokens).tolist() == pytest.approx([math.sqrt(n), 1, 1, 0])
    # A spike s: mean s/n, so variance p(1-p)s^2 with p = 1/n, and the fourth moment p(1-p)((1-p)^3 + p^3)s^4.
    p = 1 / n
    assert kurtosis(tokens).tolist() == pytest.approx([((1 - p) ** 3 + p**3) / (p * (1 - p)), 0, 1, 0])
    assert float(kurtosis(gaussian)) == pytest.approx(3, abs=0.15)
    assert float(kurtosis(torch.full((64,), 2.0).index_fill(0, torch.tensor([0]), 6e4).bfloat16())) > 60
    assert summary(torch.arange(101.0)).tolist() == [50, 50, 99, 100]


def test_pooling_keeps_every_spike_and_bounds_the_size():
    x = torch.zeros(100, 300)
    x[63, 211] = -9
    assert pooled(x, 48, 96).shape == (48, 96)
    assert float(pooled(x, 48, 96).max()) == 9
    assert torch.equal(pooled(x, 200, 400), x.abs())


@pytest.fixture
def words(tmp_path):
    sizes = ("optimize.batch_size=1", "quantize.n_sequences=5", "report.sequences=3")
    return tiny_run(tmp_path, *sizes, kind="qwen3", layers=3, sequences=60)


@pytest.mark.usefixtures("restored_process")
def test_the_pass_sees_what_transformers_computes_and_continues_where_it_was_stopped(tmp_path, words):
    assert main(["optimize", *words]) == 0
    assert main(["report", *words]) == 0
    config = load_config(None, words)
    run = RunDir(tmp_path / "run")
    before, _ = load_statistics(statistics_path(run, "none"))
    after, about = load_statistics(statistics_path(run, "learned"))
    assert about["tokens"] == "60"
    assert before.done == after.done == 3

    world = start("cpu", threads=1)
    files = open_configured_model(config)
    tokens = calibration_tokens(config, files)[:3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for name, module in (("mlp_input", layer.mlp.gate_proj), ("down_input", layer.mlp.down_proj)):
            module.register_forward_pre_hook(
                lambda _, inputs, key=f"{name}{index}": seen.setdefault(key, []).append(inputs[0][0])
            )
        layer.self_attn.v_proj.register_forward_hook(
            lambda _, __, output, key=f"values{index}": seen.setdefault(key, []).append(output[0])
        )
    with torch.no_grad():
        for ids in tokens:
            model(ids[None])
    largest = SUMMARY.index("max")
    for index in range(3):
        for site, heads in (("mlp_input", 1), ("down_input", 1), ("values", 2)):
            x = torch.cat(seen[f"{site}{index}"])
            parts = x.unflatten(-1, (heads, -1))
            ours = before.layers[site]
            assert float(ours["peak"][index][largest]) == pytest.approx(float(peak_over_rms(parts).max()), rel=1e-4)
            assert float(ours["channels"][index].max()) == pytest.approx(float(x.abs().max()), rel=1e-4)
            assert ours["surface"][index].shape == (20, min(96, x.shape[1]))
    # Rotations keep the lengths of what they turn, so a spread-out token has a lower peak, not a smaller norm.
    for site in SITES:
        assert not torch.allclose(before.layers[site]["peak"][1], after.layers[site]["peak"][1])

    path = statistics_path(run, "learned")
    whole = load_tensors(path)
    path.unlink()
    chosen = build_variant(config, files, "learned", torch.device("cpu"))
    stop_request = StopRequest()
    stop_request.name = "SIGTERM"
    for layers in (1, 2):
        with pytest.raises(Interrupted):
            _measure(config, world, files, chosen, tokens, stop_request)
        assert load_statistics(path)[0].done == layers
    stop_request.name = ""
    _measure(config, world, files, chosen, tokens, stop_request)
    again = load_tensors(path)
    assert again[1] == whole[1]
    assert all(torch.equal(again[0][name], whole[0][name]) for name in {*whole[0], *again[0]})
    written = path.stat().st_mtime_ns
    _measure(config, world, files, chosen, tokens, stop_request)
    assert path.stat().st_mtime_ns == written
    stop()
