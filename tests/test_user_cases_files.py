"""How a model may lie on a disk: what is no model, or half of one, is named in one line; what is one is read wherever it is."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_letters, write_model

from dist_spin.errors import UserError
from dist_spin.model.checkpoint_headers import check_model_path
from dist_spin.model.weights import ModelFiles, open_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 269060552\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    model = write_model("mha", tmp_path_factory.mktemp("whole") / "model", dtype=torch.float32)
    write_letters(model)
    return model


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def emptied(model: Path) -> Path:
    shutil.rmtree(model)
    model.mkdir()
    return model


def only_pickled(model: Path) -> Path:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model


def an_adapter(model: Path) -> Path:
    (emptied(model) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (model / "adapter_model.safetensors").write_bytes(b"")
    return model


def a_pointer(model: Path) -> Path:
    (model / "model.safetensors").write_text(POINTER)
    return model


def a_dangling_link(model: Path) -> Path:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "blobs" / "4d7a")
    return model


def a_gguf(content: bytes) -> Callable[[Path], Path]:
    def write(model: Path) -> Path:
        (model / "model.gguf").write_bytes(content)
        return model / "model.gguf"

    return write


def named(name: str) -> Callable[[Path], Path]:
    return lambda model: model / name


def a_folder(name: str) -> Callable[[Path], Path]:
    def make(model: Path) -> Path:
        (model / name).unlink()
        (model / name).mkdir()
        return model

    return make


def an_unfinished_download(model: Path) -> Path:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole + bytes(1000))  # space was reserved for more
    return model


REFUSED = {
    "an empty folder": (emptied, "has no config.json"),
    "only a pickle": (only_pickled, "convert the checkpoint to safetensors"),
    "an adapter": (an_adapter, "is an adapter, not a model; merge it into its model"),
    "a pointer of Git LFS": (a_pointer, "is a pointer of Git LFS, not the file itself; `git lfs pull` fetches it"),
    "a link to nothing": (a_dangling_link, "holds no model.safetensors"),
    "the weights instead of their folder": (named("model.safetensors"), "is a file; give the directory it lies in"),
    "config.json instead of its folder": (named("config.json"), "is a file; give the directory it lies in"),
    "an empty GGUF": (a_gguf(b""), "model.gguf"),
    "a GGUF of noise": (a_gguf(bytes(range(256)) * 8), "model.gguf"),
    "a GGUF that ends after its head": (a_gguf(struct.pack("<4sIQQ", b"GGUF", 3, 291, 24)), "model.gguf"),
    "a page instead of a GGUF": (a_gguf(b"<!DOCTYPE html><title>404</title>"), "model.gguf"),
    "a GGUF that is not there": (named("none.gguf"), "GGUF file"),
    "a folder in the place of config.json": (a_folder("config.json"), "config.json cannot be read"),
    "a folder in the place of the weights": (a_folder("model.safetensors"), "model.safetensors"),
    "more bytes than its header says": (an_unfinished_download, "model.safetensors cannot be read"),
}


def opened(path: str) -> ModelFiles:
    """The model, after what is checked without torch."""
    check_model_path(path)
    return open_model(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_named_in_one_line(model, name):
    change, said = REFUSED[name]
    path = str(change(model))
    with pytest.raises(UserError) as refused:
        opened(path)
    line = str(refused.value)
    assert said in line
    assert str(model) in line
    assert refused.value.remedy
    assert "\n" not in line


def with_a_pickle_beside(model: Path) -> Path:
    (model / "pytorch_model.bin").write_bytes(b"never read")
    return model


def with_old_buffers(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def moved(name: str) -> Callable[[Path], Path]:
    return lambda model: Path(shutil.move(model, model.with_name(name)))


def behind_links(model: Path) -> Path:
    """As the hub's cache lays it out: a folder of links to files by their hashes."""
    snapshot = model.with_name("snapshot")
    snapshot.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        blob = path.rename(model / f"blob{number}")
        (snapshot / path.name).symlink_to(blob)
    (model.parent / "main").symlink_to(snapshot)
    return model.parent / "main"


TAKEN = {
    "a pickle beside": with_a_pickle_beside,
    "buffers of old versions": with_old_buffers,
    "a name with blanks": moved("my  model"),
    "a name of other letters": moved("模型-é"),
    "a name with an equals sign and quotes": moved("a='b'"),
    "a name that looks like an option": moved("--model"),
    "links, as in the hub's cache": behind_links,
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_model_is_read_wherever_and_with_whatever_it_lies(model, whole, name):
    path = str(TAKEN[name](model))
    files, original = opened(path), open_model(str(whole))
    for parameter in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(files.weights.rows(parameter), original.weights.rows(parameter))
    assert files.tokenizer()("a b")["input_ids"] == original.tokenizer()("a b")["input_ids"]
