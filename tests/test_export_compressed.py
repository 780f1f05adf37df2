"""The compressed-tensors format: its library reads our codes exactly, and transformers' model has the pipeline's bits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig, TransformFactory
from exported import NO_HAD, R4_BLOCK, W4A4, W4A8, W4A16, exported, logits, make_run, pipeline_cell, settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import dist_spin
from dist_spin.layer_files import layer_path, load_layer
from dist_spin.model import sites
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.numerics.quantizer import QuantSpec, dequantize_weight
from dist_spin.rundir import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

ACTIVATIONS = {"W4A16": W4A16, "W4A8": W4A8, "W4A4": W4A4}
WEIGHTS = {
    "rows": [],
    "groups": ["quant.w_group_size=16"],
    "groups-asymmetric": ["quant.w_group_size=16", "quant.w_symmetric=false"],
    "rows-asymmetric": ["quant.w_symmetric=false"],
    "down8": ["quant.down_bits=8", "quant.w_group_size=16"],
    "down8-asymmetric": ["quant.down_bits=8", "quant.w_symmetric=false"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compressed")


@pytest.fixture(scope="module")
def run(place):
    """Quantised runs and their exports by the settings that differ, each made once."""
    made: dict[str, tuple[list[str], Path, Path]] = {}

    def make(kind: str, *more: str) -> tuple[list[str], Path, Path]:
        name = f"run{abs(hash((kind, more)))}"
        if name not in made:
            words = settings(place, kind, f"name={name}", *more)
            made[name] = words, make_run(words, "optimize", "quantize"), exported(words, "compressed-tensors")
        return made[name]

    return make


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in directory.glob("model-*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("profile", [NO_HAD, R4_BLOCK], ids=["no-had", "r4-block"])
@pytest.mark.parametrize("kind", ["gqa_tied", "qwen2"])
def test_load_has_the_bits_of_the_quantised_model(run, kind, profile, activations):
    words, _, directory = run(kind, *profile, *ACTIVATIONS[activations])
    model = dist_spin.load(directory, device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "gptq")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_has_the_bits_in_half_precision(place, dtype):
    words = settings(place / dtype, "gqa_tied", *NO_HAD, *W4A8, dtype=dtype)
    make_run(words, "optimize", "quantize")
    model = dist_spin.load(exported(words, "compressed-tensors"), device="cpu")
    assert model.dtype == getattr(torch, dtype)
    assert torch.equal(logits(model), logits(pipeline_cell(words, "gptq")))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_library_reads_codes_and_scales_exactly(run, weights):
    """compressed-tensors' own decompression, asked linear by linear, against the layer files."""
    words, path, directory = run("gqa_tied", *NO_HAD, *W4A16, *WEIGHTS[weights])
    about = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in about.items() if k != "version"})
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = tensors_of(directory)
    for index in range(2):
        layer, _ = load_layer(layer_path(RunDir(path).layers(), index))
        for role in LAYER_LINEARS:
            prefix = f"model.layers.{index}.{role}."
            mine = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
            group = "down" if role == "mlp.down_proj" and "down" in config.config_groups else "linears"
            scheme = config.config_groups[group]
            assert scheme.weights.num_bits == layer.bits[role]
            assert torch.equal(mine["weight_scale"], layer.solutions[role].scale)
            found = compressor.decompress(mine, scheme)["weight"]
            wanted = dequantize_weight(*layer.solutions[role], layer.group_size)
            assert torch.equal(found, wanted)
            # Compressing that weight again gives the stored words: nothing else is in them.
            again = compressor.compress(
                {"weight": wanted, **{k: v for k, v in mine.items() if k == "weight_scale"}, **zero_point(layer, role)},
                scheme,
            )
            assert torch.equal(again["weight_packed"], mine["weight_packed"])
            assert torch.equal(again["weight_shape"], mine["weight_shape"])
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell(words, "gptq")))


def zero_point(layer, role: str) -> dict[str, torch.Tensor]:
    if layer.symmetric:
        return {}
    return {"weight_zero_point": (layer.solutions[role].zero - 2 ** (layer.bits[role] - 1)).to(torch.int8)}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dequantize", [True, False], ids=["dequantized", "compressed"])
def test_bare_transformers_has_the_bits_of_our_weights(run, weights, dequantize):
    words, _, directory = run("gqa_tied", *NO_HAD, *W4A16, *WEIGHTS[weights])
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    # transformers cannot dequantise two widths, nor keep packed zero points; it must at least say so.
    if weights.startswith("down8") if dequantize else weights.endswith("asymmetric"):
        with pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(directory, **how)
        return
    bare = AutoModelForCausalLM.from_pretrained(directory, **how)
    assert torch.equal(logits(bare), logits(pipeline_cell(words, "gptq", off="kv")))


@pytest.mark.parametrize("activations", ["W4A8", "W4A4"])
@pytest.mark.parametrize("kind", ["gqa_tied", "qwen2"])
def test_bare_transformers_differs_in_the_grid_of_activations_alone(run, kind, activations, monkeypatch):
    """compressed-tensors divides the largest activation by 127.5 (7.5), we by 127 (7): no setting of the format says which."""
    words, _, directory = run(kind, *NO_HAD, *ACTIVATIONS[activations])
    bare = AutoModelForCausalLM.from_pretrained(directory)
    ours = logits(pipeline_cell(words, "gptq", off="kv"))
    assert 1e-4 < relative(logits(bare), ours) < 1

    def theirs(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        if not spec.enabled:
            return x
        scale = x.abs().amax(-1, keepdim=True) / ((2**spec.bits - 1) / 2)
        return torch.clamp(torch.round(x / scale), -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) * scale

    monkeypatch.setattr(sites, "fake_quantize", theirs)
    assert torch.equal(logits(bare), logits(pipeline_cell(words, "gptq", off="kv")))
    for module in bare.modules():
        module.quantization_enabled = False
    assert torch.equal(logits(bare), logits(pipeline_cell(words, "gptq", off="aokv")))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["gqa_tied", "qwen2"])
def test_transform_config_says_what_is_online(run, kind):
    """transformers leaves R4 out and says so; the library's own transform, applied as the config says, puts it right."""
    words, _, directory = run(kind, *R4_BLOCK, *W4A16)
    ours = logits(pipeline_cell(words, "gptq", off="kv"))
    bare = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    said = subprocess.run([sys.executable, "-c", bare, str(directory)], capture_output=True, text=True, check=True)
    assert re.search(r"mlp\.down_proj\.R4_input\.weight\s.*UNEXPECTED", said.stderr)
    card = (directory / "README.md").read_text()
    assert "**A bare transformers `from_pretrained` is wrong**" in card
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(directory, **how)
    assert relative(logits(model), ours) > 0.1
    about = json.loads((directory / "config.json").read_text())["quantization_config"]["transform_config"]
    config = TransformConfig.model_validate(about)
    for name, scheme in config.config_groups.items():
        scheme.apply = [part for part in scheme.apply if part.is_online()]  # the others are in the weights
        TransformFactory.from_scheme(scheme, name=name).apply_to_model(model, use_tqdm=False)
    assert relative(logits(model), ours) < 1e-5
    # The stored Hadamard, which loaders may take instead of making it, is the one that the library makes.
    stored = tensors_of(directory)["model.layers.0.mlp.down_proj.R4_input.weight"]
    assert torch.equal(stored, model.model.layers[0].mlp.down_proj.R4_input.weight)
