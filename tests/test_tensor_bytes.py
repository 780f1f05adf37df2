"""Tensors are read from safetensors files in pieces, by several threads, to the same bits; their checksums see every piece."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.model.tensor_bytes import DTYPES, PIECE_BYTES, opened, read_header, read_into
from dist_spin.model.weights import SafetensorsWeights
from dist_spin.storage.tensor_file import HEADER, CorruptFile, load_tensors, save_tensors


def test_every_dtype_comes_back_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.manual_seed(0)
    tensors = {name: (torch.rand(3, 5) * 2).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 4)}
    save_file(tensors, path, {"about": "ü"})
    with opened(path) as descriptor, safe_open(path, framework="pt") as library:
        metadata, ranges = read_header(descriptor)
        assert metadata == {"about": "ü"}
        assert ranges.keys() == tensors.keys()
        for name, (dtype, shape, offset) in ranges.items():
            out = torch.empty(shape, dtype=dtype)
            read_into(descriptor, [(offset, out)])
            assert out.dtype == library.get_tensor(name).dtype
            assert torch.equal(
                out.reshape(-1).view(torch.uint8), library.get_tensor(name).reshape(-1).view(torch.uint8)
            )


@given(start=st.integers(0, 9), stop=st.none() | st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_rows_are_those_of_a_slice(start: int, stop: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "rows"
    weight = torch.arange(9 * 4, dtype=torch.bfloat16).view(9, 4)
    if not directory.exists():
        directory.mkdir()
        save_file(
            {"model.embed_tokens.weight": weight, "model.norm.weight": weight[0].clone()},
            directory / "model.safetensors",
        )
    rows = SafetensorsWeights(directory).rows("model.embed_tokens.weight", start, stop)
    assert torch.equal(rows, weight[start:stop])


def test_a_checkpoint_that_is_cut_off_later_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.embed_tokens.weight": torch.ones(64, 64)}, path)
    weights = SafetensorsWeights(tmp_path)
    for size in (path.stat().st_size - 8, 30, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(it is cut off"):
            SafetensorsWeights.rows(weights, "model.embed_tokens.weight")


def test_a_tensor_of_several_pieces_comes_back_and_a_flipped_bit_in_any_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    large = torch.arange(2 * PIECE_BYTES // 8 + 3)
    save_tensors(path, {"large": large, "small": torch.ones(3)}, {"step": "1"})
    assert torch.equal(load_tensors(path)[0]["large"], large)
    whole = path.read_bytes()
    begin = whole.index(large[:4].numpy().tobytes())
    for place in (begin, begin + PIECE_BYTES - 1, begin + PIECE_BYTES, begin + 2 * PIECE_BYTES + 20):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 4]))
        with pytest.raises(CorruptFile, match="checksum does not match"):
            load_tensors(path)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    load_tensors(path)


def with_sha256(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file as version 0.2 wrote it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode() + tensor.numpy().tobytes())
    text = f"{digest.hexdigest()} {json.dumps(metadata, sort_keys=True)}"
    header = {"metadata": metadata, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(tensors, path, {HEADER: json.dumps(header, sort_keys=True)})


def test_files_with_the_checksum_of_before_are_still_held_to_it(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(5)}
    with_sha256(path, tensors, {"step": "3"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"step": "3"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    whole, unnoticed = path.read_bytes(), []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(CorruptFile):
            load_tensors(path)
            unnoticed.append(place)
    assert unnoticed == []


@pytest.mark.gpu
def test_the_same_bits_arrive_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"large": torch.randn(3 * PIECE_BYTES // 4 + 5), "codes": torch.arange(64, dtype=torch.int8)}
    save_tensors(path, tensors, {})
    loaded, _ = load_tensors(path, "cuda")
    assert all(loaded[name].is_cuda and torch.equal(loaded[name].cpu(), tensor) for name, tensor in tensors.items())
