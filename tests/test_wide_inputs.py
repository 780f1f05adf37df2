"""Inputs of linears that have 8 bits among others of 4 (`quant.a8_inputs`): what is computed, kept, named, refused."""

import json
from pathlib import Path

import pytest
import torch
from exported import R4_BLOCK, exported, logits, make_run, pipeline_cell, settings

import dist_spin
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.model.sites_config import CLIP_SITES, Sites
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.storage.results import bits_label

pytestmark = pytest.mark.usefixtures("restored_process")

SOME = "quant.a8_inputs=[0.down,1.attention]"
ALL = (
    f"quant.a8_inputs=[{','.join(f'{layer}.{site}' for layer in (0, 1) for site in ('attention', 'o', 'mlp', 'down'))}]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[str], Path]:
    """Settings and directory of a run of two layers, learned with clips, whose calibration sees quantised activations."""
    place = tmp_path_factory.mktemp("wide")
    words = settings(place, "gqa_tied", *R4_BLOCK, "optimize.clips=true", "quantize.quantize_activations=true")
    return words, make_run(words, "optimize")


def test_named_inputs_have_eight_bits_and_their_whole_range_where_they_are_quantised():
    four = QuantSpec(4, group_size=8, clip_ratio=0.9)
    sites = Sites(four, four, four, four, wide=((0, "down"), (1, "attention")), clips=torch.full((2, 6), 0.5))
    assert sites.layer(0).bits == {**dict.fromkeys(CLIP_SITES, 4), "down": 8}
    assert sites.layer(1).bits == {**dict.fromkeys(CLIP_SITES, 4), "attention": 8}
    assert sites.layer(0).down == QuantSpec(8, group_size=8)
    assert sites.layer(1).mlp == sites.layer(0).a == QuantSpec(4, group_size=8, clip_ratio=0.45)
    assert set(Sites(wide=sites.wide).layer(0).bits.values()) == {16}


def test_all_inputs_named_is_what_eight_bits_everywhere_are(run):
    words, _ = run
    eight = logits(pipeline_cell([*words, "quant.a_bits=8"], "none"))
    some, four = (logits(pipeline_cell([*words, *more], "none")) for more in ([SOME], []))
    assert torch.equal(logits(pipeline_cell([*words, ALL], "none")), eight)
    assert not torch.equal(some, four)
    assert not torch.equal(some, eight)


def test_stages_keep_what_was_learned_and_say_how_many_inputs_are_wide(run, capfd):
    words, path = run
    learned = (path / "rotations" / "final.safetensors").stat().st_mtime_ns
    make_run(words, "optimize", "quantize", "evaluate")
    layers = [file.read_bytes() for file in sorted((path / "layers").glob("0*.safetensors"))]
    make_run([*words, SOME], "optimize", "quantize", "evaluate")
    assert (path / "rotations" / "final.safetensors").stat().st_mtime_ns == learned
    assert [file.read_bytes() for file in sorted((path / "layers").glob("0*.safetensors"))] != layers  # calibrated anew
    assert "W4A4KV4 + 2 x A8" in capfd.readouterr().out
    rows = {
        row["weights"]: row for row in json.loads((path / "results.json").read_text()) if row["rotation"] == "learned"
    }
    assert rows["gptq"]["a8_inputs"] == ["0.down", "1.attention"]
    assert bits_label(rows["gptq"]) == "W4A4KV4 + 2 x A8"


def test_exports_say_it_or_refuse(run, capfd):
    words, path = run
    directory = exported([*words, SOME], "hf")
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell([*words, SOME], "none")))
    assert "activations 4 bits (0.down, 1.attention: 8)" in (directory / "README.md").read_text()
    exported([*words, "quant.a8_inputs=[]"], "hf")  # anew, not taken for the same
    assert torch.equal(logits(dist_spin.load(directory, device="cpu")), logits(pipeline_cell(words, "none")))
    assert main(["export", str(path), "--format", "compressed-tensors", *words, SOME]) == 2
    assert "one number of bits for all inputs of linears, not with quant.a8_inputs" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quant.a8_inputs=[0.gate]"], "quant.a8_inputs is '0.gate'; name inputs as LAYER.INPUT"),
        (["quant.a8_inputs=[0.o,0.o]"], "name each input once"),
        (["quant.a8_inputs=[0.o]", "quant.a_bits=8"], "leave them out, or use"),
        (["quant.a8_inputs=[0.o]", "quant.a_format=mxfp4"], "leave them out, or use"),
    ],
)
def test_what_names_no_input_is_refused(words, said):
    with pytest.raises(UserError) as caught:
        load_config(None, words)
    assert said in str(caught.value)


def test_layers_that_are_not_there_and_comparisons_are_refused(run, capfd):
    words, _ = run
    assert main(["quantize", *words, "quant.a8_inputs=[0.o,2.down]"]) == 2
    assert "quant.a8_inputs has 2.down, but the model has 2 layers" in capfd.readouterr().err
    assert main(["compare", *words, SOME]) == 2
    assert "quant.a8_inputs has no place in columns of one number of bits" in capfd.readouterr().err
