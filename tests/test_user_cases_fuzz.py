"""Mutated config.json, indexes and headers of a checkpoint: one line each, never a traceback."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import SHAPES, write_model

from dist_spin.errors import DamagedWeights, UserError
from dist_spin.model.checkpoint_headers import check_model_path
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles, open_model

MANY = settings(
    max_examples=350, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**63, 10**30]),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.integers(-1, 3), max_size=2),
    st.dictionaries(
        st.sampled_from(["rope_type", "rope_theta", "factor", "quant_method"]), st.text(max_size=5), max_size=2
    ),
)
CONFIG_KEYS = sorted({*SHAPES["qwen2"].to_dict(), "head_dim", "quantization_config"})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small checkpoint in two files with an index."""
    directory = write_model("qwen2", tmp_path_factory.mktemp("fuzz") / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    open_model(str(directory))
    return directory


def opened(directory: Path) -> ModelFiles | None:
    """The model, or None where it was refused in one line with a remedy."""
    refusals: list[UserError] = []
    files = None
    for check in (check_model_path, open_model):
        try:
            files = check(str(directory))
        except UserError as error:
            refusals.append(error)
    assert all(error.remedy and "\n" not in str(error) and len(str(error)) < 900 for error in refusals)
    return files


def runs(files: ModelFiles) -> None:
    """A layer of the model computes; numbers that are none are refused when they are read."""
    weights = RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float32)
    runner = LayerRunner(files.config, Sites(), device=CPU, dtype=torch.float32, rotated=False)
    hidden = torch.ones(1, 9, files.shape.hidden)
    try:
        layer = weights.layer(0)
    except DamagedWeights:
        return
    assert runner.run(runner.build(0, layer), 0, hidden).shape == hidden.shape


@MANY
@given(
    changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), JUNK, min_size=1, max_size=3),
    removed=st.sampled_from(["", *CONFIG_KEYS]),
)
def test_any_config(model, changes, removed):
    original = (model / "config.json").read_text()
    content: dict[str, Any] = json.loads(original) | changes
    content.pop(removed, None)
    try:
        (model / "config.json").write_text(json.dumps(content))
        if (files := opened(model)) is not None:
            runs(files)
    finally:
        (model / "config.json").write_text(original)


@MANY
@given(data=st.data())
def test_any_bytes_in_the_jsons(model, data):
    file = data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    original = (model / file).read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    with_bytes = original[:at] + data.draw(st.binary(max_size=4)) + original[at + data.draw(st.integers(0, 40)) :]
    try:
        (model / file).write_bytes(with_bytes)
        if (files := opened(model)) is not None:
            runs(files)
    finally:
        (model / file).write_bytes(original)


@MANY
@given(data=st.data())
def test_any_header(model, data):
    file = model / "a.safetensors"
    original = file.read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    header: dict[str, Any] = json.loads(original[8 : 8 + length])
    kind = data.draw(st.sampled_from(["field", "bytes", "length", "name"]))
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    if kind == "bytes":
        at = data.draw(st.integers(0, 8 + length))
        mutated = original[:at] + data.draw(st.binary(max_size=3)) + original[at + data.draw(st.integers(0, 3)) :]
    elif kind == "length":
        mutated = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + original[8:]
    else:
        if kind == "field":
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(
                st.one_of(
                    JUNK,
                    st.sampled_from(["F8_E4M3", "I8", "U8", "BF16", "F16"]),
                    st.lists(st.integers(0, 99), max_size=3),
                )
            )
        else:
            header[data.draw(st.text(max_size=12))] = header.pop(name)
        text = json.dumps(header).encode()
        mutated = struct.pack("<Q", len(text)) + text + original[8 + length :]
    try:
        file.write_bytes(mutated)
        if (files := opened(model)) is not None:
            runs(files)
    finally:
        file.write_bytes(original)


def test_the_model_is_whole_again(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    assert open_model(str(tmp_path / "copy")).notes == ()
