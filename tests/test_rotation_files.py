"""Rotation files: the published naming round trip, and everything that is refused with one line."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.storage.rotations import finished_rotations, load_rotations, save_final
from dist_spin.storage.run_directory import RunDir

HIDDEN, HEAD, LAYERS = 12, 4, 3


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]


R1, R2 = orthogonal(HIDDEN, HIDDEN).contiguous(), orthogonal(LAYERS, HEAD, HEAD).contiguous()
PUBLISHED = {"R1": R1.float(), **{f"model.layers.{i}.self_attn.R2": R2[i].float() for i in range(LAYERS)}}


def load(path: Path, hidden: int = HIDDEN, head: int = HEAD, layers: int = LAYERS) -> tuple[Tensor, Tensor]:
    return load_rotations(path, hidden, head, layers)


def refused(path: Path, **sizes: int) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **sizes)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    save_final(run, R1, R2, {"step": "100"})
    return run


def test_both_files_come_back(run):
    r1, r2 = load(run.rotations / "final.safetensors")
    assert torch.equal(r1, R1)
    assert torch.equal(r2, R2)
    r1, r2 = load(run.rotations / "R.bin")
    assert (r1.dtype, r2.dtype) == (torch.float64, torch.float64)
    assert torch.equal(r1, R1.float().double())
    assert torch.equal(r2, R2.float().double())


def test_r_bin_has_the_published_names_and_dtype(run):
    saved = torch.load(run.rotations / "R.bin", weights_only=True)
    assert saved.keys() == PUBLISHED.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, PUBLISHED[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not the whole stack behind each layer
    assert (run.rotations / "R.bin").stat().st_size < 5000


def test_files_of_others_are_read(tmp_path):
    torch.save({k: v.bfloat16() for k, v in PUBLISHED.items()}, tmp_path / "half.bin")  # rounded, yet orthogonal enough
    assert (load(tmp_path / "half.bin")[0] - R1).abs().max() < 1e-2
    torch.save({k: torch.nn.Parameter(v) for k, v in PUBLISHED.items()}, tmp_path / "parameters.bin")
    assert torch.equal(load(tmp_path / "parameters.bin")[1], R2.float().double())
    save_file(PUBLISHED, tmp_path / "named.safetensors")
    assert torch.equal(load(tmp_path / "named.safetensors")[1], R2.float().double())


@pytest.mark.parametrize("name", ["final.safetensors", "R.bin"])
def test_the_rotation_of_another_model_is_refused_with_both_sizes(run, name):
    path = run.rotations / name
    message = refused(path, hidden=16)
    assert "(12, 12)" in message
    assert "(16, 16)" in message
    assert "another model" in message
    assert "(8, 8)" in refused(path, head=8)
    assert "2 R2" in refused(path, layers=2)  # a smaller model of the same family: not silently the first layers
    refused(path, layers=4)


def test_a_matrix_that_is_not_orthogonal_is_refused_by_name(tmp_path):
    stretched = R2.clone()
    stretched[1, 0] *= 1.1
    save_file({"R1": R1, "R2": stretched}, tmp_path / "r.safetensors")
    assert "R2 is not orthogonal" in refused(tmp_path / "r.safetensors")
    save_file({"R1": R1 * float("nan"), "R2": R2}, tmp_path / "r.safetensors")
    assert "R1 is not orthogonal" in refused(tmp_path / "r.safetensors")


class Touch:
    """What a malicious pickle does: run a function while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save):
    save(PUBLISHED | {"more": Touch(tmp_path / "ran")}, tmp_path / "R.bin")
    assert "is not a rotation file" in refused(tmp_path / "R.bin")
    assert not (tmp_path / "ran").exists()
    if save is torch.save:
        torch.load(tmp_path / "R.bin", weights_only=False)
    else:
        pickle.loads((tmp_path / "R.bin").read_bytes())
    assert (tmp_path / "ran").exists()  # the file really was dangerous


@pytest.mark.parametrize(
    "content", [PUBLISHED["R1"], list(PUBLISHED), {"R1": 5, "R2": R2}, {"R1": PUBLISHED["R1"]}, {}, {"R1": R1, "R2": 3}]
)
def test_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "R.bin")
    refused(tmp_path / "R.bin")


def test_damage_is_refused(run, tmp_path):
    for name in ("R.bin", "final.safetensors"):
        path = run.rotations / name
        path.write_bytes(path.read_bytes()[:-20])
        refused(path)
        path.write_bytes(b"")
        refused(path)
    np.save(tmp_path / "r.npy", R1.numpy())
    refused(tmp_path / "r.npy")
    refused(tmp_path / "none.bin")
    assert "does not exist" in refused(tmp_path)


def test_one_changed_byte_of_our_own_file_is_refused(run):
    path = run.rotations / "final.safetensors"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-8] ^= 1  # the last bit of a number: it stays orthogonal
    path.write_bytes(bytes(damaged))
    assert load_file(path).keys() == {"R1", "R2"}
    assert "checksum" in refused(path)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def emptied(content: bytes) -> bytes:
    return b""


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, zeroed])
def test_damaged_final_rotations_are_set_aside_and_named_to_who_reads_them(run, damage):
    path, said = run.rotations / "final.safetensors", []
    assert finished_rotations(run, said.append)
    assert said == []
    path.write_bytes(damage(path.read_bytes()))
    assert "`dist-spin optimize` of that run makes it again" in refused(path)
    assert not finished_rotations(run, said.append)
    assert not path.exists()
    assert (run.rotations / "final.stale").exists()
    assert len(said) == 1
    assert "making it again from the newest checkpoint" in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, zeroed, None])
def test_a_damaged_or_missing_r_bin_is_made_again_to_the_same_bytes(run, damage):
    path, said = run.rotations / "R.bin", []
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(whole))
    assert finished_rotations(run, said.append)
    assert path.read_bytes() == whole
    assert said == [f"{path} is {'missing' if damage is None else 'damaged'}; making it again from final.safetensors"]
    assert finished_rotations(run, said.append)
    assert len(said) == 1


def test_an_r_bin_of_other_rotations_is_made_again(run, tmp_path):
    other = RunDir(tmp_path / "other")
    save_final(other, R1.mT, R2, {"step": "100"})
    (run.rotations / "R.bin").write_bytes((other.rotations / "R.bin").read_bytes())
    assert finished_rotations(run, [].append)
    assert torch.equal(load(run.rotations / "R.bin")[0], R1.float().double())
