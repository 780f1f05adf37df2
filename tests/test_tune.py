"""After rounding, scales and gains learn from full precision: codes stay, and what is measured is what was tuned."""

import pytest
import torch
from tiny import tiny_run

from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.evaluate.stage import evaluate
from dist_spin.optimize.train import train
from dist_spin.pipeline.fingerprints import layer_identity
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import build_variant, calibration_tokens
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.stage import quantize
from dist_spin.quantize.tune import TunedNetwork, full_precision_states
from dist_spin.runtime.distributed import start, stop
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.quantized_layers import load_layer


@pytest.fixture
def world(restored_process):
    yield start("cpu", 60, 1)
    stop()


def settings(place, name, *more):
    """Few calibration sequences, so that rounding is far from what steps can still gain."""
    words = ("optimize.optimizer=cayley_adam", "optimize.lr=0.02", "optimize.scales=true", "quantize.n_sequences=8")
    return tiny_run(place, f"name={name}", *words, "quantize.split=all", *more)


def test_tuning_keeps_codes_and_lowers_the_divergence_of_text_that_it_does_not_see(tmp_path, world):
    rows, layers = {}, {}
    for name, steps in (("rounded", 0), ("tuned", 12)):
        config = load_config(None, settings(tmp_path, name, f"quantize.tune_steps={steps}", "quantize.tune_lr=0.01"))
        train(config, world)
        quantize(config, world)
        rows[name] = evaluate(config, world)[-1]
        layers[name] = load_layer(tmp_path / name / "layers" / "001.safetensors")[0]
    event = next(line for line in read_lines(tmp_path / "tuned" / "events.jsonl") if line["event"] == "tuned")
    assert event["after"] < event["before"]
    assert rows["tuned"]["kl"] < 0.95 * rows["rounded"]["kl"]
    for role, weight in layers["rounded"].quantized_weights.items():
        tuned = layers["tuned"].quantized_weights[role]
        assert torch.equal(tuned.codes, weight.codes)
        assert not torch.equal(tuned.scale, weight.scale)
    gain = "input_layernorm.weight"
    assert not torch.equal(layers["tuned"].others[gain], layers["rounded"].others[gain])
    assert not (tmp_path / "tuned" / "baselines" / "untuned").exists()
    before = (tmp_path / "tuned" / "layers" / "001.safetensors").stat().st_mtime_ns
    leftover = tmp_path / "tuned" / "baselines" / "untuned" / "layers"
    leftover.mkdir(parents=True)  # of one that was killed before it removed them
    quantize(config, world)  # a second start finds everything done
    assert not leftover.parent.exists()
    assert (tmp_path / "tuned" / "layers" / "001.safetensors").stat().st_mtime_ns == before


def test_settings_of_tuning_decide_no_layer_that_is_not_tuned(tmp_path, world):
    identities = []
    for more in ([], ["quantize.tune_steps=5"], ["quantize.tune_steps=5", "quant.k_bits=8"]):
        config = load_config(None, settings(tmp_path, "run", *more))
        files, tokens = open_configured_model(config), calibration_tokens(config, open_configured_model(config))
        variant = build_variant(config, files, "hadamard", world.device)
        identities.append(layer_identity(config, files, variant, tokens))
    assert identities[0] == identities[1] == identities[2]


def test_the_tuned_network_starts_as_the_rounded_one_with_its_own_gradient(tmp_path, world):
    config = load_config(None, settings(tmp_path, "run"))
    train(config, world)
    quantize(config, world)
    files = open_configured_model(config)
    variant, tokens = build_variant(config, files, "learned", world.device), calibration_tokens(config, files)
    job = QuantizeJob(config, world, files, variant, tokens, StopRequest())
    network, targets = TunedNetwork(job, job), full_precision_states(job)
    loss = network.loss(tokens, targets)
    loss.backward()
    gradient = {key: p.grad.clone() for key, p in network.parameters.items()}
    # Nothing behind the last quantiser is rounded, so that there the gradient is the slope.
    key = (1, "mlp.down_proj.weight")
    direction = torch.randn(gradient[key].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope, losses = float((gradient[key] * direction).sum()), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            network.parameters[key].copy_(step * direction)
            losses.append(float(network.loss(tokens, targets)))
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)
    assert all(bool(g.any()) for g in gradient.values())


def test_jobs_of_layers_are_refused():
    with pytest.raises(UserError, match="all layers are tuned together"):
        load_config(None, ["name=x", "model.path=m", "quantize.tune_steps=5", "quantize.layers_per_job=2"])
