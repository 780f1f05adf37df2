"""Runs in number formats: learned, quantised, measured, compared, with what they cannot hold refused in one line."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from exported import exported, logits, make_run, pipeline_cell
from tiny import tiny_run, write_model
from transformers import AutoModelForCausalLM, LlamaConfig

import dist_spin
from dist_spin.cli import main
from dist_spin.compare.plan import at_bits, clips_text, settings_of
from dist_spin.config.loader import load_config
from dist_spin.export.serving import kv_cache_dtype
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import INPUT_SCALES, Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.format_rounding import global_scale
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.runtime.distributed import World
from dist_spin.storage.quantized_layers import layer_path, load_layer
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

# Sizes of whole groups of 32 everywhere.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
PLAIN = ["rotation.online=false", "optimize.a_bits=0", "quant.k_bits=16", "quant.v_bits=16"]
FP8 = ["quant.w_format=fp8", "quant.a_format=fp8", "quant.w_bits=8", "quant.a_bits=8"]
NVFP4 = ["quant.w_format=nvfp4", "quant.a_format=nvfp4"]
MXFP4 = ["quant.w_format=mxfp4", "quant.a_format=mxfp4"]
FP8_KV = ["quant.kv_format=fp8", "quant.k_bits=8", "quant.v_bits=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config = LlamaConfig(**SIZES, **IDS, num_hidden_layers=2, tie_word_embeddings=True)
    return write_model(config, tmp_path_factory.mktemp("formats") / "model", dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ([*FP8, *FP8_KV], "W8A8KV8-fp8"),
        ([*MXFP4, *FP8_KV, "optimize.w_bits=4"], "W4A4-mxfp4-KV8-fp8"),
        (NVFP4, "W4A4-nvfp4"),
    ],
    ids=["fp8", "mxfp4", "nvfp4"],
)
def test_a_run_learns_rounds_measures_and_comes_back(model, tmp_path, settings, label, capfd):
    words = tiny_run(tmp_path, "model.dtype=float32", *PLAIN, *settings, model=model)
    run = make_run(words, "optimize", "quantize", "evaluate")
    assert label in capfd.readouterr().out
    rows = json.loads((run / "results.json").read_text())
    assert {row["weights"] for row in rows} >= {"none", "gptq"}
    layer, _ = load_layer(layer_path(RunDir(run).layers(), 0))
    assert all(figures["error"] < figures["rtn_error"] for figures in layer.figures.values())
    if layer.format == "nvfp4":  # what engines fuse shares its global scale
        shared = layer.tensor_scales
        assert shared["self_attn.q_proj"] == shared["self_attn.k_proj"] == shared["self_attn.v_proj"]
        assert shared["mlp.gate_proj"] == shared["mlp.up_proj"] != shared["self_attn.q_proj"]
        assert len(set(layer.others[INPUT_SCALES].tolist())) == 4
    # The quantisers at run time come back with an export whose weights are not packed.
    loaded = dist_spin.load(exported(words, "hf"), device="cpu")
    assert torch.equal(logits(loaded), logits(pipeline_cell(words, "none")))


EXPORTED = {
    "fp8": ("float-quantized", FP8),
    "mxfp8": ("mxfp8-quantized", [word.replace("=fp8", "=mxfp8") for word in FP8]),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4),
    "mxfp4-a16": ("mxfp4-pack-quantized", [MXFP4[0], "quant.a_bits=16", "optimize.a_bits=4"]),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_in_a_format_has_the_bits_of_the_run_here_and_in_bare_transformers(tmp_path, name):
    layout, settings = EXPORTED[name]
    config = LlamaConfig(**SIZES, **IDS, num_hidden_layers=2, tie_word_embeddings=True)
    half = write_model(config, tmp_path / "model", dtype=torch.bfloat16)
    words = tiny_run(
        tmp_path, "model.dtype=bfloat16", "export.target=compressed-tensors", *PLAIN, *settings, model=half
    )
    words.append("optimize.steps=0")
    make_run(words, "quantize")
    directory = exported(words, "compressed-tensors")
    about = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert about["format"] == layout
    ours = logits(pipeline_cell(words, "gptq"))
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), ours)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), ours)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("seen", [True, False], ids=["quantised-inputs", "plain-inputs"])
def test_global_scales_of_inputs_are_those_of_the_largest_and_go_with_the_layer(model, seen):
    files = open_model(str(model), dtype=torch.float32)
    weights = RotatedWeights(files.weights, files.shape, None, (), torch.device("cpu"), torch.float32)
    spec = QuantSpec(4, symmetric=True, group_size=16, format="nvfp4")
    sites = Sites(a=spec, o=spec)
    runner = LayerRunner(
        files.config, sites if seen else Sites(), device=weights.device, dtype=torch.float32, rotated=False
    )
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 20, 64, generator=generator) for _ in range(4)]
    entered, options = list(hidden), GPTQOptions(group_size=16, format="nvfp4")
    alone = World(0, 1, 0, 1, weights.device)
    quantizer = LayerQuantizer(runner, alone, "gptq", options, torch.float32, input_scales=True)
    layer = quantizer.quantize(0, weights.layer(0), hidden)
    plain = LayerRunner(files.config, Sites(), device=weights.device, dtype=torch.float32, rotated=False)
    norm = plain.build(0, weights.layer(0)).input_layernorm
    largest = max(norm(h).abs().amax() for h in entered)
    assert layer.others[INPUT_SCALES][0] == global_scale(largest)
    finished = layer.weights(torch.float32, weights.device)
    served = LayerRunner(files.config, sites, device=weights.device, dtype=torch.float32, rotated=False).build(
        0, finished
    )
    scales = [
        served.input_layernorm.spec,
        served.self_attn.o_proj.input_quant.spec,
        served.post_attention_layernorm.spec,
    ]
    scales.append(served.mlp.down_proj.input_quant.spec)
    assert [site.tensor_scale for site in scales] == layer.others[INPUT_SCALES].tolist()
    rebuilt = runner.build(0, finished)
    assert all(torch.equal(runner.run(rebuilt, 0, h), left) for h, left in zip(entered, hidden, strict=True))


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_tuning_leaves_scales_of_8_bits(model, tmp_path, name):
    words = tiny_run(tmp_path, "optimize.steps=2", *PLAIN, *(NVFP4 if name == "nvfp4" else FP8), model=model)
    words += ["quantize.n_sequences=1", "quantize.tune_lr=0.01", "optimize.scales=true"]
    layers = []
    for steps in (0, 3):
        more = (f"name=tuned{steps}", f"quantize.tune_steps={steps}")
        assert main(["optimize", *words, *more]) == main(["quantize", *words, *more]) == 0
        layers.append(load_layer(tmp_path / f"tuned{steps}" / "layers" / "000.safetensors")[0])
    for role, before in layers[0].quantized_weights.items():
        after = layers[1].quantized_weights[role]
        assert torch.equal(after.codes.float(), before.codes.float())
        assert torch.equal(after.scale, before.scale) == (name == "nvfp4")
    assert not torch.equal(*(layer.others["input_layernorm.weight"] for layer in layers))


@pytest.mark.parametrize("scales", [False, True])
def test_nothing_to_tune_is_said(model, tmp_path, capsys, scales):
    """With scales too, where no step learns them: before the layers are rounded."""
    words = tiny_run(tmp_path, "optimize.steps=0", *PLAIN, *NVFP4, "quantize.tune_steps=2", model=model)
    for verb in ("quantize", "plan"):
        assert main([verb, *words, f"optimize.scales={scales}"]) == 2
        said = capsys.readouterr().err
        assert "quantize.tune_steps finds nothing to tune: quant.w_format=nvfp4 holds scales" in said, verb


@pytest.mark.usefixtures("group_of_one")
def test_a_token_of_massive_values_does_not_round_the_others_to_zero(model):
    files = open_model(str(model), dtype=torch.float32)
    runner = LayerRunner(files.config, Sites(), device=torch.device("cpu"), dtype=torch.float32, rotated=False)
    quantizer = LayerQuantizer(
        runner,
        World(0, 1, 0, 1, torch.device("cpu")),
        "gptq",
        GPTQOptions(group_size=16, format="nvfp4"),
        torch.float32,
        input_scales=True,
    )
    spec = QuantSpec(4, symmetric=True, group_size=16, format="nvfp4")
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    usual = x.unflatten(-1, (-1, 16)).abs().amax(-1).log2().mean().exp2()
    assert quantizer._scaled(spec, [x], []).tensor_scale == global_scale(x.abs().amax())
    x[0, 0, 5] = 1e8  # a sink
    found: list[float] = []
    scaled = quantizer._scaled(spec, [x], found)
    assert 0.5 < 448 * 6 / (found[0] * 28672 * usual) < 2
    kept = fake_quantize(x, scaled)
    plain = fake_quantize(x, dataclasses.replace(spec, tensor_scale=float(global_scale(x.abs().amax()))))
    assert not plain[0, 1:].any()  # the scale of the largest value leaves nothing of them
    assert float((kept - x)[0, 1:].square().mean()) < 0.02
    assert kept[0, 0, 5] > 1e4


def test_layers_without_scales_of_inputs_are_made_again_for_nvfp4_activations(model, tmp_path):
    words = tiny_run(tmp_path, "model.dtype=float32", "optimize.steps=0", *PLAIN, "quant.w_format=nvfp4", model=model)
    for activations, scales in ((["quant.a_bits=16"], False), (["quant.a_format=nvfp4"], True)):
        run = make_run([*words, *activations], "optimize", "quantize")
        layer, _ = load_layer(layer_path(RunDir(run).layers(), 0))
        assert (INPUT_SCALES in layer.others) is scales


def test_a_cache_is_served_in_fp8_where_keys_and_values_are_both():
    keys, left = QuantSpec(8, symmetric=True, format="fp8"), QuantSpec(16, format="fp8")
    assert kv_cache_dtype(Sites(k=keys, v=keys)) == "fp8"
    assert kv_cache_dtype(Sites(k=keys, v=left)) == "auto"
    four = QuantSpec(4)
    assert kv_cache_dtype(Sites(k=four, v=four)) == "int4_per_token_head"
    assert kv_cache_dtype(Sites(k=four, v=four, k_bias_apart=True)) == "auto"


def test_a_column_of_integers_has_the_published_clips_beside_formats(model, tmp_path):
    words = tiny_run(tmp_path, "quant.a_format=mxfp4", model=model)
    config = at_bits(settings_of(load_config(None, words), "quarot", 0, "gptq"), "gptq", (4, 4, 4))
    assert clips_text(config) == "quarot"


def test_a_column_is_tuned_where_something_is_left_to_tune(model, tmp_path):
    for steps, of_narrow_scales in ((2, 7), (0, 0)):
        words = ["quantize.tune_steps=7", "optimize.scales=true", f"optimize.steps={steps}"]
        config = load_config(None, tiny_run(tmp_path, *words, model=model))
        for name, bits, wanted in (("int", 4, 7), ("fp8", 8, 7), ("nvfp4", 4, of_narrow_scales)):
            column = at_bits(config, "gptq", (bits, 16, 16), (name, "int", "int"))
            assert column.quantize.tune_steps == wanted, name


def test_a_table_has_columns_of_formats(model, tmp_path, capfd):
    columns = ["W4A4-mxfp4-KV8-fp8", "W4A4KV4"]
    more = [f"compare.bits=[{', '.join(columns)}]", "compare.methods=[quarot]", "compare.seeds=[0]"]
    more += ["compare.weights=[gptq]", "quant.w_group_size=16", "quant.a_clip_ratio=0.9"]
    assert main(["compare", *tiny_run(tmp_path, "model.dtype=float32", *more, model=model)]) == 0
    table = capfd.readouterr().out
    assert all(column in table for column in columns)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["quant.w_format=fp8"], "quant.w_bits is 4; quant.w_format=fp8 has 8 bits, so use 8"),
        (["quant.a_format=fp8"], "quant.a_bits is 4"),
        (["quant.w_format=mxfp4", "quant.w_group_size=16"], "has groups of 32, so use 0"),
        (["quant.w_format=mxfp4", "quant.w_symmetric=false"], "has no zero point, so use true"),
        (["quant.w_format=mxfp4", "quant.down_bits=8"], "quant.down_bits is 8"),
        (["quant.a_format=mxfp4", "quant.a_clip_ratio=0.9"], "clips nothing, so use 1"),
        (["quant.a_format=mxfp4", "quant.clips=quarot"], "clips nothing, so use none"),
        (["quant.a_format=nvfp4", "quant.o_per_head=true"], "quant.o_per_head is True"),
        (["quant.kv_format=fp8"], "quant.k_bits is 4"),
        (["quant.a_format=nf4"], "quant.a_format"),
        ([*MXFP4, "optimize.a_bits=8"], "optimize.a_bits=8, but quant.a_format=mxfp4; use 4"),
        ([*MXFP4, "optimize.w_bits=8"], "optimize.w_bits=8, but quant.w_format=mxfp4; use 4"),
        ([*MXFP4, "optimize.clips=true"], "use optimize.clips=false"),
        ([*MXFP4, "export.target=executorch"], "executorch is for integers, not for quant.w_format=mxfp4"),
        (
            ["quant.w_format=nvfp4", "quant.a_format=mxfp4", "export.target=compressed-tensors"],
            "set quant.a_format=nvfp4",
        ),
    ],
)
def test_what_formats_do_not_hold_is_refused_in_one_line(model, tmp_path, settings, said, capfd):
    assert main(["optimize", *tiny_run(tmp_path, *settings, model=model)]) == 2
    error = capfd.readouterr().err.strip()
    assert said in error.splitlines()[-1]


def test_groups_that_do_not_fit_the_model_are_refused(tmp_path, capfd):
    assert main(["optimize", *tiny_run(tmp_path, "quant.a_format=mxfp4")]) == 2
    assert (
        "quant.a_format=mxfp4 has groups of 32, which do not divide this model's sizes 48, 80" in capfd.readouterr().err
    )
