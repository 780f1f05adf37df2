"""One layer's quantisation, the files it ends in, and the hidden states that jobs start from."""

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny import write_model
from torch import Tensor

from dist_spin.bench import quantize as bench
from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.gptq import GPTQOptions, prepare, solve
from dist_spin.numerics.hessian import Hessian
from dist_spin.quantize.job import layer_ranges_of, ranges_within
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.report.status_text import ranges
from dist_spin.runtime.distributed import World
from dist_spin.storage import hidden_states as boundary_files
from dist_spin.storage.hidden_states import HiddenStateFiles
from dist_spin.storage.quantized_layers import finished_layer, save_layer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("group_of_one")


def layer_parts(place: Path, dtype: torch.dtype = torch.float64) -> tuple[LayerRunner, dict[str, Tensor], list[Tensor]]:
    """A runner, one rotated layer's weights, and hidden states that enter it."""
    files = open_model(str(write_model("biases", place / "model")), dtype=dtype)
    weights = RotatedWeights(
        files.weights, files.shape, initial("orthogonal", files.shape, 0), (), torch.device("cpu"), dtype
    )
    runner = LayerRunner(files.config, Sites(), device=torch.device("cpu"), dtype=dtype, rotated=True)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 20, files.shape.hidden, generator=generator, dtype=dtype) for _ in range(10)]
    return runner, weights.layer(0), hidden


@pytest.mark.parametrize(
    "options", [GPTQOptions(), GPTQOptions(group_size=16, symmetric=False, mse_clip=True)], ids=str
)
def test_linears_of_a_site_solved_together_are_those_solved_apart(tmp_path, options):
    runner, weights, hidden = layer_parts(tmp_path)
    norm = runner.build(0, weights).input_layernorm
    hessian = Hessian(hidden[0].shape[-1], torch.float64)
    for h in hidden:
        hessian.add(norm(h))
    factor = prepare(hessian.mean(), options)
    layer = LayerQuantizer(runner, ALONE, "gptq", options, torch.float64).quantize(0, weights, hidden)
    for role in ("q_proj", "k_proj", "v_proj"):
        apart = solve(weights[f"self_attn.{role}.weight"], factor, options)
        for mine, theirs in zip(layer.quantized_weights[f"self_attn.{role}"], apart, strict=True):
            assert torch.equal(mine, theirs)


def test_hidden_states_leave_as_the_quantised_layer_sends_them(tmp_path):
    runner, weights, hidden = layer_parts(tmp_path)
    before = list(hidden)
    layer = LayerQuantizer(runner, ALONE, "gptq", GPTQOptions(), torch.float64).quantize(0, weights, hidden)
    quantised = runner.build(0, layer.weights(torch.float64, torch.device("cpu")))
    for entered, left in zip(before, hidden, strict=True):
        assert torch.equal(runner.run(quantised, 0, entered), left)
    for figures in layer.figures.values():
        assert 0 < figures["error"] < figures["rtn_error"] < 1


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_any_damage_to_a_layer_file_is_noticed(tmp_path):
    runner, weights, hidden = layer_parts(tmp_path)
    layer = LayerQuantizer(runner, ALONE, "rtn", GPTQOptions(), torch.float64).quantize(0, weights, hidden)
    path = tmp_path / "000.safetensors"
    save_layer(path, layer, "made so")
    whole = path.read_bytes()
    about = json.dumps("made so")[1:-1].encode()
    # The length of the header, its names, its metadata (twice: a fingerprint, a figure), and the first and last tensor.
    places = [2, whole.index(b"q_proj"), whole.index(about), whole.index(b"rtn_error"), len(whole) // 2, len(whole) - 1]
    lines: list[str] = []
    for place in places:
        path.write_bytes(whole)
        flip(path, place)
        assert finished_layer(path, "made so", lines.append) is None, place
        assert not path.exists()
        assert path.with_suffix(".stale").exists()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert finished_layer(path, "made so", lines.append) is None
    path.write_bytes(whole)
    assert finished_layer(path, "made otherwise", lines.append) is None
    other = tmp_path / "001.safetensors"
    other.write_bytes(whole)
    assert finished_layer(other, "made so", lines.append) is None
    assert len(lines) == len(places) + 6
    assert all("doing the layer again" in line for line in lines)
    path.write_bytes(whole)
    found = finished_layer(path, "made so", lines.append)
    assert found is not None
    assert all(
        torch.equal(found.quantized_weights[r].codes, layer.quantized_weights[r].codes) for r in layer.quantized_weights
    )


def test_equal_layers_are_equal_files(tmp_path):
    """safetensors alone would write several metadata entries in random order."""
    runner, weights, hidden = layer_parts(tmp_path)
    files = []
    for name in ("a", "b"):
        layer = LayerQuantizer(runner, ALONE, "gptq", GPTQOptions(), torch.float64).quantize(0, weights, list(hidden))
        path = tmp_path / name / "000.safetensors"
        save_layer(path, layer, "made so")
        files.append(path.read_bytes())
    assert files[0] == files[1]


def stored(place: Path) -> HiddenStateFiles:
    return HiddenStateFiles(place / "boundaries", "made so", sequences=35, tokens=6, hidden=8, dtype=torch.float32)


def test_hidden_states_come_back_or_are_missed(tmp_path):
    files = stored(tmp_path)
    assert [len(chunk) for chunk in files.chunks()] == [3] * 11 + [2]
    hidden = torch.randn(35, 6, 8)
    assert not files.present(4)
    for number, chunk in enumerate(files.chunks()):
        files.save(4, number, hidden[chunk.start : chunk.stop])
    assert files.present(4)
    assert not files.present(3)
    lines: list[str] = []
    assert torch.equal(torch.cat([files.load(4, c, lines.append) for c in range(12)]), hidden)  # type: ignore[misc]
    flip(files.path(4, 2), files.path(4, 2).stat().st_size - 5)
    os.replace(files.path(4, 3), files.path(4, 1))  # another chunk's
    files.path(4, 0).write_bytes(files.path(4, 0).read_bytes()[:-9])
    assert [files.load(4, c, lines.append) is None for c in range(6)] == [True] * 4 + [False] * 2
    assert len(lines) == 3  # chunk 3 is gone and nothing was set aside for it
    assert all("computing it again" in line for line in lines)
    files.remove()
    assert not files.directory.exists()


def test_hidden_states_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    files, lines = stored(tmp_path), []
    one = 35 * 6 * 8 * 4
    monkeypatch.setattr(boundary_files.shutil, "disk_usage", lambda path: usage(0, 0, 4 * one))
    files.check_space([2], lines.append)
    assert not lines
    files.check_space([2, 4, 6], lines.append)
    assert "layers_per_job" in lines[0]
    with pytest.raises(UserError, match="layers_per_job"):
        files.check_space([2, 4, 6, 8], lines.append)


def test_spans():
    assert layer_ranges_of(7, 0) == layer_ranges_of(7, 7) == layer_ranges_of(7, 9) == [(0, 7)]
    assert layer_ranges_of(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert ranges_within(layer_ranges_of(7, 3), (3, 7)) == [(3, 6), (6, 7)]
    for wrong in ((0, 2), (1, 6), (3, 8), (6, 6), (9, 12)):
        with pytest.raises(UserError, match=f"{wrong[0]}:{wrong[1]}"):
            ranges_within(layer_ranges_of(7, 3), wrong)


def test_ranges():
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_bench_times_the_parts_of_a_layer(tmp_path, capsys):
    from dist_spin.runtime import distributed

    distributed.stop()  # the benchmark starts its own
    out = tmp_path / "b.json"
    words = f"--shape tiny --sequences 4 --seq-len 32 --repeats 1 --sweeps 1 --device cpu --baseline --out {out}"
    assert main(["bench", "quantize", *words.split()]) == 0
    figures = json.loads(out.read_text())
    parts = sum(figures["seconds"][part] for part in (bench.MERGE, *bench.PARTS))
    assert 0.5 * figures["seconds"]["layer"] < parts <= figures["seconds"]["layer"]
    assert 0 < figures["floor_s"] < figures["seconds"]["layer"]
    assert figures["solver"]["codes_equal"] > 0.999
    assert figures["solver"]["error"] == pytest.approx(figures["solver"]["plain_error"], rel=1e-3)
    assert "times as fast" in capsys.readouterr().out
