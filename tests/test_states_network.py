"""The hidden states that jobs start from: those of the original network times R1, where that is the same thing."""

import json
from pathlib import Path

import pytest
import torch
from test_model import CPU, online_sites, relative
from tiny import tiny_run, write_model
from torch import Tensor

from dist_spin.cli import main
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import initial
from dist_spin.model.scales_and_clips import scale_shapes
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.pipeline.variants import unquantized
from dist_spin.quantize.states_network import StatesNetwork
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.tensor_file import load_tensors, save_tensors

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def network(files: ModelFiles, dtype: torch.dtype, rotation: Tensor | None = None) -> StatesNetwork:
    """The original network, as the stage makes it."""
    return StatesNetwork(
        LayerRunner(files.config, Sites(), device=CPU, dtype=dtype, rotated=False),
        RotatedWeights(files.weights, files.shape, None, (), CPU, dtype),
        rotation,
    )


def rotated_network(files: ModelFiles, dtype: torch.dtype, rotations: tuple[Tensor, Tensor]) -> StatesNetwork:
    """The rotated network with everything that is merged into it: R4, a Hadamard across heads, learned scales."""
    sites = online_sites(files, 4)
    heads = kronecker_factors(files.shape.heads, 1, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(2)
    shared_keys = files.weights.has("model.layers.0.self_attn.k_norm.weight")
    scales = {
        name: torch.rand(files.shape.layers, *size, generator=generator, dtype=torch.float64) + 0.5
        for name, size in scale_shapes(files.shape, shared_keys=shared_keys).items()
    }
    sites = unquantized(Sites(sites.a, sites.o, sites.k, sites.v, sites.r3, sites.r4, heads))
    weights = RotatedWeights(files.weights, files.shape, rotations, sites.r4, CPU, dtype, heads, scales)
    return StatesNetwork(LayerRunner(files.config, sites, device=CPU, dtype=dtype, rotated=True), weights)


def states(network: StatesNetwork, layers: int) -> list[Tensor]:
    """What enters each layer and leaves the last, in the variant's basis."""
    hidden = network.weights.embedding()[IDS]
    out = [network.rotated(hidden)]
    for i in range(layers):
        hidden = network.runner.run(network.runner.build(i, network.weights.layer(i)), i, hidden)
        out.append(network.rotated(hidden))
    return out


@pytest.mark.parametrize("kind", ["biases", "qwen3"])
def test_in_bfloat16_they_are_as_near_to_the_truth_as_the_rotated_ones(kind, tmp_path):
    layers = 6
    files = open_model(str(write_model(kind, tmp_path, layers=layers, dtype=torch.bfloat16)))
    rotations = initial("orthogonal", files.shape, 3)
    truth = states(network(files, torch.float64, rotations[0]), layers)
    ours = states(network(files, torch.bfloat16, rotations[0]), layers)
    today = states(rotated_network(files, torch.bfloat16, rotations), layers)
    errors = [[relative(h.double(), t) for h, t in zip(found, truth, strict=True)] for found in (ours, today)]
    assert all(new < 1.1 * old for new, old in zip(*errors, strict=True)), errors
    assert 1e-3 < errors[0][-1] < 0.1


class Stage:
    """A run of four layers in two jobs, whose stored states are looked at."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> None:
        self.path, self._capsys = place / "run", capsys
        words = ("name=run", "optimize.steps=0", "rotation.r4_block=16", "quantize.layers_per_job=2", *settings)
        self._words = tiny_run(place, *words, layers=4)

    def quantize(self, *words: str) -> str:
        """What the stage said."""
        self._capsys.readouterr()
        assert main(["quantize", *self._words, *words]) == 0
        return self._capsys.readouterr().err

    def stored(self, directory: str = "boundaries") -> Tensor:
        """[n, T, h] that enter layer 2."""
        chunks = sorted((self.path / directory / "002").glob("*.safetensors"))
        return torch.cat([load_tensors(chunk)[0]["hidden"] for chunk in chunks])


@pytest.fixture
def stage(tmp_path, capsys, restored_process):
    return lambda *settings: Stage(tmp_path, capsys, *settings)


def test_all_variants_share_one_pass_which_needs_no_rotation(stage):
    run = stage("quantize.baselines=[none, hadamard]")
    said = run.quantize("--hidden-states")
    assert "own layers" not in said
    events = read_lines(run.path / "events.jsonl")
    assert [event["layer"] for event in events if event["event"] == "boundary"] == [2]
    assert not list(run.path.glob("baselines/*/boundaries"))
    run.quantize()
    assert len(list(run.path.glob("**/layers/*.safetensors"))) == 12
    assert not (run.path / "boundaries").exists()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("quantize.quantize_activations=true", "quantize.quantize_activations quantises inside it"),
        ("model.dtype=float16", "in float16 states may fit after R1 alone"),
    ],
)
def test_where_the_original_network_is_not_the_same_the_rotated_one_is_run_and_it_is_said(stage, setting, reason):
    run = stage(setting, "quantize.baselines=[orthogonal]")
    said = run.quantize("--hidden-states")
    assert f"hidden states of learned are those of its own layers: {reason}" in said
    ours, baseline = run.stored(), run.stored("baselines/orthogonal/boundaries")
    assert relative(ours.double(), baseline.double()) > 0.1


def test_states_of_a_network_with_other_settings_are_made_again_and_other_names_keep_them(stage):
    run, again = stage(), "hidden states at layers 2 belong to other settings or another version: made again"
    run.quantize("--hidden-states")
    before = run.stored()
    file = run.path.parent / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_name_or_path": "elsewhere", "transformers_version": "5.0.0"}))
    assert again not in run.quantize("--hidden-states")
    file.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert again in run.quantize("--hidden-states")
    assert relative(run.stored().double(), before.double()) > 1e-3


def test_states_of_an_older_version_are_made_again_with_a_line(stage):
    run = stage()
    run.quantize("--hidden-states")
    whole = run.stored()
    for chunk in (run.path / "boundaries" / "002").iterdir():
        tensors, metadata = load_tensors(chunk)
        save_tensors(chunk, {"hidden": -tensors["hidden"]}, metadata | {"fingerprint": "of rotated layers"})
    assert "hidden states at layers 2 belong to other settings or another version: made again" in run.quantize(
        "--hidden-states"
    )
    assert torch.equal(run.stored(), whole)
