"""Exports of runs that learned scales and clips: the bits of the pipeline's own model, and clips refused where none can be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import NO_HAD, R4_BLOCK, W4A4, W4A8, W4A16, exported, logits, make_run, pipeline_cell, settings
from transformers import AutoModelForCausalLM

import dist_spin
from dist_spin.cli import main
from dist_spin.export.loader import load
from dist_spin.export.sidecar import read_sidecar
from dist_spin.model.weights import SafetensorsWeights
from dist_spin.storage.rotations import load_transforms

pytestmark = pytest.mark.usefixtures("restored_process")

SCALES = ["optimize.scales=true", "optimize.scale_lr=0.3"]
CLIPS = ["optimize.clips=true", "optimize.clip_lr=0.3"]
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scales")


def stored_norms(directory: Path) -> list[torch.Tensor]:
    source = SafetensorsWeights(directory)
    return [source.rows(f"model.layers.{index}.{norm}.weight") for index in range(2) for norm in NORMS]


@pytest.mark.parametrize("kind", ["gqa_tied", "biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("profile", [NO_HAD, R4_BLOCK], ids=["no-had", "r4-block"])
def test_hf_carries_scales_in_its_weights_and_clips_for_the_loader(place, kind, profile):
    words = settings(place, kind, f"name={kind}-{profile[0][-4:]}", *profile, *SCALES, *CLIPS)
    run = make_run(words, "optimize")
    learned = load_transforms(run / "rotations" / "final.safetensors")
    directory = exported(words, "hf")
    for norm, name in zip(stored_norms(directory), NORMS * 2, strict=True):
        assert any(torch.equal(norm, scale.float()) for scale in learned[f"scale.{name}"])
        assert (norm - 1).abs().max() > 0.05
    model = load(directory, device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "none")))
    assert torch.equal(read_sidecar(directory).sites.clips, learned["clip"])
    if profile is NO_HAD:  # scales cancel; clips are the quantisers' alone
        bare, original = (AutoModelForCausalLM.from_pretrained(path) for path in (directory, place / kind))
        torch.testing.assert_close(logits(bare), logits(original), rtol=2e-3, atol=5e-4)
    card = (directory / "README.md").read_text()
    assert "| Learned scales | merged" in card
    assert "| Learned clips | in the quantisers" in card


def test_the_loader_honours_the_clips(place):
    """Without the clips of its sidecar the same weights give other logits."""
    words = settings(place, "gqa_tied", "name=clips", *NO_HAD, *CLIPS)
    make_run(words, "optimize")
    directory = exported(words, "hf")
    sidecar = read_sidecar(directory)
    with pytest.MonkeyPatch.context() as patch:
        whole = replace(sidecar, sites=replace(sidecar.sites, clips=None))
        patch.setattr("dist_spin.export.loader.read_sidecar", lambda directory: whole)
        without = logits(load(directory, device="cpu"))
    assert (logits(load(directory, device="cpu")) - without).abs().max() > 1e-3
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in stored_norms(directory))


@pytest.mark.parametrize(
    ("bits", "learned", "profile"),
    [
        (W4A16, [*SCALES, *CLIPS], NO_HAD),
        (W4A16, [*SCALES, *CLIPS], R4_BLOCK),
        (W4A8, SCALES, NO_HAD),
        (W4A4, SCALES, R4_BLOCK),
    ],
    ids=["W4A16", "W4A16-r4", "W4A8", "W4A4-r4"],
)
@pytest.mark.parametrize("kind", ["gqa_tied", "qwen2", "qwen3"])
def test_compressed_tensors_carries_scales(place, kind, bits, learned, profile, request):
    """At 16-bit activations the clips of keys and values too, which the loader honours."""
    words = settings(place, kind, f"name={request.node.callspec.id}", *profile, *bits, *learned)
    run = make_run(words, "optimize", "quantize")
    learned_values = load_transforms(run / "rotations" / "final.safetensors")
    assert (learned_values["scale.value"] - 1).abs().max() > 0.05
    directory = exported(words, "compressed-tensors")
    moved = [bool((norm - 1).abs().max() > 0.05) for norm in stored_norms(directory)]
    assert moved == [bits is not W4A16] * 4  # where no activation is quantised, nothing moves the norms' scales
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell(words, "gptq")))
    if bits is W4A16 and profile is NO_HAD:
        bare = AutoModelForCausalLM.from_pretrained(directory)
        assert torch.equal(logits(bare), logits(pipeline_cell(words, "gptq", off="kv")))


def test_bf16_scales_have_the_bits_too(place):
    words = settings(place / "bf16", "gqa_tied", "name=ct", *NO_HAD, *W4A16, *SCALES, *CLIPS, dtype="bfloat16")
    make_run(words, "optimize", "quantize")
    for target, weights in (("hf", "none"), ("compressed-tensors", "gptq")):
        model = dist_spin.load(exported(words, target), device="cpu")
        assert torch.equal(logits(model), logits(pipeline_cell(words, weights)))


REMEDY = "learn with optimize.clips=false"


def one_line(capfd) -> str:
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-spin:"))
    return line


def test_clips_of_activations_that_a_runtime_quantises_are_refused_at_the_start(place, tmp_path, capfd):
    words = [*settings(place, "gqa_tied", *NO_HAD, *W4A8, *CLIPS), f"output_dir={tmp_path}"]
    assert main(["optimize", *words, "export.target=compressed-tensors"]) == 2
    assert REMEDY in one_line(capfd)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert main(["optimize", *words, *W4A16, "export.target=compressed-tensors", "name=weights"]) == 0
    assert main(["optimize", *words, "export.target=hf"]) == 0
    capfd.readouterr()
    assert main(["export", *words, "--format", "compressed-tensors"]) == 2  # without a target, at the end
    assert REMEDY in one_line(capfd)
    assert not list((tmp_path / "run").glob("export/*"))
    # The same where clips come from a file.
    given = f"rotation.load={tmp_path / 'run' / 'rotations' / 'final.safetensors'}"
    again = [*words, given, "optimize.clips=false", "optimize.steps=0", "name=given"]
    assert main(["quantize", *again, "export.target=compressed-tensors"]) == 2
    assert REMEDY in one_line(capfd)
    assert json.loads((tmp_path / "run" / "fingerprint.json").read_text())["optimize.clips"] is True
