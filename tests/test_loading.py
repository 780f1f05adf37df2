"""Weights are loaded by several threads to the same bits, and what one of them finds wrong is said."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_run, write_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_spin.config.loader import load_config
from dist_spin.errors import DamagedWeights
from dist_spin.optimize.setup import build_training
from dist_spin.optimize.sharding import fsdp
from dist_spin.runtime.distributed import World, start, stop


@pytest.fixture
def world(restored_process: None) -> Iterator[World]:
    yield start("cpu", 60, 1)
    stop()


def loaded(place: Path, model: Path, world: World) -> dict[str, Tensor]:
    learning = build_training(load_config(None, tiny_run(place, model=model)), world)
    parameters = dict(learning.model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    return {name: parameter.to_local().clone() for name, parameter in parameters.items()}  # type: ignore[attr-defined]


def test_threads_load_the_same_bits(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model("qwen3", tmp_path / "model")
    one = loaded(tmp_path / "one", model, world)
    monkeypatch.setattr(fsdp, "loading_threads", lambda device: 4)
    four = loaded(tmp_path / "four", model, world)
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_damage_that_a_thread_finds_is_said(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model("mha", tmp_path / "model")
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-8:] = b"\xff" * 8  # the last number of the last tensor becomes NaN
    file.write_bytes(content)
    monkeypatch.setattr(fsdp, "loading_threads", lambda device: 4)
    with pytest.raises(DamagedWeights, match="holds nan"):
        loaded(tmp_path, model, world)
