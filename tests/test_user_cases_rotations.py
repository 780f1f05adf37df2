"""What a user may give as rotation.load: anything but the rotations, scales and clips of this model is refused in one line."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import settings
from safetensors.torch import save_file
from torch import Tensor
from user_cases import Tensors, refusal

from dist_spin.cli import main
from dist_spin.model.sites_config import CLIP_SITES
from dist_spin.storage.tensor_file import save_tensors

pytestmark = [pytest.mark.usefixtures("restored_process"), pytest.mark.filterwarnings("ignore::UserWarning")]

HIDDEN, HEAD, LAYERS = 48, 12, 2


def identity() -> Tensors:
    return {"R1": torch.eye(HIDDEN), "R2": torch.eye(HEAD).repeat(LAYERS, 1, 1)}


def published() -> Tensors:
    return {"R1": torch.eye(HIDDEN), **{f"model.layers.{i}.self_attn.R2": torch.eye(HEAD) for i in range(LAYERS)}}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], Path]:
    """R.bin with one tensor changed."""

    def write(place: Path) -> Path:
        torch.save({**published(), name: change(published()[name])}, place / "R.bin")
        return place / "R.bin"

    return write


def more_layers(place: Path) -> Path:
    torch.save({**published(), "model.layers.2.self_attn.R2": torch.eye(HEAD)}, place / "R.bin")
    return place / "R.bin"


def ours(**more: Tensor) -> Callable[[Path], Path]:
    """A file as `optimize` writes it, with more tensors."""

    def write(place: Path) -> Path:
        save_tensors(place / "R.safetensors", {**identity(), **more}, {"step": "3"})
        return place / "R.safetensors"

    return write


def of_others(place: Path) -> Path:
    save_file({**identity(), "scale.mlp": torch.ones(LAYERS, HIDDEN)}, place / "R.safetensors")
    return place / "R.safetensors"


def folder(place: Path) -> Path:
    (place / "R.bin").mkdir()
    return place / "R.bin"


def nan(values: Tensor) -> Tensor:
    return torch.full_like(values, math.nan)


CLIPS = torch.ones(LAYERS, len(CLIP_SITES))
NORM = "scale.input_layernorm"
REFUSED = {
    "a sparse matrix": (changed("R1", Tensor.to_sparse), "sparse"),
    "a compressed sparse matrix": (changed("R1", Tensor.to_sparse_csr), "sparse"),
    "a complex matrix": (changed("R1", lambda r: r + 1j), "complex64"),
    "whole numbers": (changed("R1", Tensor.int), "int32"),
    "a quantised matrix": (changed("R1", lambda r: torch.quantize_per_tensor(r, 0.1, 0, torch.qint8)), "quantised"),
    "a matrix without content": (changed("R1", lambda r: r.to("meta")), "meta"),
    "nan": (changed("R1", nan), "R1 is not orthogonal"),
    "zeros": (changed("model.layers.1.self_attn.R2", torch.zeros_like), "R2 is not orthogonal"),
    "one layer more": (more_layers, "3 R2"),
    "another size": (changed("R1", lambda r: torch.eye(64)), "R1 (64, 64)"),
    "a vector": (changed("R1", lambda r: r[0]), "R1 (48,)"),
    "an unknown name": (ours(R3=torch.eye(HEAD)), "it holds R3, which is no rotation, scale or clip"),
    "an unknown scale": (of_others, "scale.mlp (2, 48), but this model has none of that name"),
    "clips of more layers": (ours(clip=torch.ones(3, len(CLIP_SITES))), "clip (3, "),
    "clips of fewer sites": (ours(clip=CLIPS[:, 1:]), "it was made for another model"),
    "clips above 1": (ours(clip=2 * CLIPS), "numbers that no clip has"),
    "clips of nan": (ours(clip=nan(CLIPS)), "numbers that no clip has"),
    "scales of another width": (ours(**{NORM: torch.ones(LAYERS, 64)}), f"holds {NORM} (2, 64)"),
    "scales of zero": (ours(**{NORM: torch.zeros(LAYERS, HIDDEN)}), "numbers that no scale has"),
    "scales without end": (ours(**{NORM: torch.full((LAYERS, HIDDEN), math.inf)}), "numbers that no scale has"),
    "a folder": (folder, "does not exist"),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return settings(tmp_path_factory.mktemp("model"), "mha", "quant.w_bits=16", "quantize.method=none")


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_rotation_of_this_model_is_refused(words, tmp_path, capfd, name):
    write, said = REFUSED[name]
    more = [f"rotation.load={write(tmp_path)}", f"output_dir={tmp_path / 'runs'}"]
    line = refusal(capfd, "optimize", [*words, *more, "optimize.steps=0"])
    assert said in line
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize("write", [ours(), ours(clip=CLIPS, **{NORM: torch.ones(LAYERS, HIDDEN)})])
def test_a_file_of_this_model_is_taken(words, tmp_path, write):
    more = [f"rotation.load={write(tmp_path)}", f"output_dir={tmp_path / 'runs'}", "optimize.steps=0"]
    assert main(["optimize", *words, *more]) == 0
