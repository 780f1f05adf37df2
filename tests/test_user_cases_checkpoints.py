"""Checkpoints that users bring: already quantised, damaged, or of another config; each is refused in one line, or loads.

Every case stands for its kind. `write_model`'s tiny checkpoint is changed as the case says.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import settings
from safetensors.torch import load_file, save_file
from tiny import write_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from user_cases import Tensors, case, configure, refusal, rewrite

from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.model.weights import open_model

pytestmark = pytest.mark.usefixtures("restored_process")

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def linears(directory: Path, change: Callable[[str, Tensor], Tensors]) -> None:
    """Put what `change` makes of each decoder linear in its place."""

    def every(tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for name, tensor in tensors.items():
            out |= change(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
        return out

    rewrite(directory, every)


def fp8(name: str, weight: Tensor) -> Tensors:
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(len(weight), 1)}


def int8(name: str, weight: Tensor) -> Tensors:
    return {name: weight.to(torch.int8), name.replace("weight", "SCB"): torch.ones(len(weight))}


def four_bits(name: str, weight: Tensor) -> Tensors:
    return {name: torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4)}


def gptq(name: str, weight: Tensor) -> Tensors:
    role = name.removesuffix("weight")
    return {f"{role}qweight": torch.zeros(len(weight.T) // 8, len(weight), dtype=torch.int32)}


def packed(name: str, weight: Tensor) -> Tensors:
    return {f"{name}_packed": torch.zeros(len(weight), len(weight.T) // 8, dtype=torch.int32)}


def sharded(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    """The checkpoint in two files, with an index that `change` has changed."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    file_of = {name: f"part-{int('layers.1' in name)}.safetensors" for name in tensors}
    for file in set(file_of.values()):
        save_file(
            {name: tensors[name] for name in tensors if file_of[name] == file}, directory / file, {"format": "pt"}
        )
    change(file_of)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def with_method(method: str, **more: object) -> Callable[[Path], None]:
    return lambda directory: configure(directory, quantization_config={"quant_method": method, **more})


def without(*names: str) -> Callable[[Path], None]:
    return lambda d: rewrite(d, lambda tensors: {k: v for k, v in tensors.items() if k not in names})


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_text(content)


QUANTISED = {
    "fp8 by config": (with_method("fp8"), r"\(fp8, says its config.json\)"),
    "compressed-tensors by config": (
        with_method("compressed-tensors", format="int-quantized"),
        r"\(compressed-tensors, int-quantized, says",
    ),
    "bitsandbytes 8 by config": (with_method("bitsandbytes", load_in_8bit=True), r"\(bitsandbytes, 8 bit, says"),
    "bitsandbytes 4 by config": (with_method("bitsandbytes", load_in_4bit=True), r"\(bitsandbytes, 4 bit, says"),
    "gptq by config": (with_method("gptq", bits=4), r"\(gptq, says"),
    "awq by config": (with_method("awq", bits=4), r"\(awq, says"),
    "mxfp4 by config": (with_method("mxfp4"), r"\(mxfp4, says"),
    "a config of no known form": (lambda d: configure(d, quantization_config=[1]), r"\(quantization_config, says"),
    "fp8 codes": (lambda d: linears(d, fp8), "compressed-tensors or fp8"),
    "fp8 codes without scales": (
        lambda d: linears(d, lambda name, w: {name: w.to(torch.float8_e5m2)}),
        "holds codes of type F8_E5M2",
    ),
    "int8 codes": (lambda d: linears(d, int8), "bitsandbytes, 8 bit: "),
    "four-bit codes": (lambda d: linears(d, four_bits), "bitsandbytes, 4 bit: "),
    "gptq codes": (lambda d: linears(d, gptq), "GPTQ or AWQ"),
    "packed codes": (lambda d: linears(d, packed), "compressed-tensors: "),
}
DAMAGED = {
    "config of another": (
        lambda d: configure(d, intermediate_size=128),
        r"gate_proj.weight in .* is 80 x 48, .* 128 x 48",
    ),
    "fewer heads": (
        lambda d: configure(d, num_attention_heads=2, num_key_value_heads=2, head_dim=12),
        "q_proj.weight in",
    ),
    "more layers": (lambda d: configure(d, num_hidden_layers=10**9), "says 1000000000 layers, the files hold 2"),
    "a smaller vocabulary": (
        lambda d: configure(d, vocab_size=90),
        r"embed_tokens.weight in .* is 97 x 48, .* 90 x 48",
    ),
    "a larger vocabulary": (
        lambda d: configure(d, vocab_size=120),
        r"embed_tokens.weight in .* is 97 x 48, .* 120 x 48",
    ),
    "biases asked for": (lambda d: configure(d, attention_bias=True), "holds no model.layers.0.self_attn.q_proj.bias"),
    "a tensor missing": (without(UP), f"holds no {UP}"),
    "no embedding": (without("model.embed_tokens.weight"), "holds no model.embed_tokens.weight"),
    "a norm of integers": (
        lambda d: rewrite(d, lambda t: {k: v.int() if k == "model.norm.weight" else v for k, v in t.items()}),
        "codes of type I32",
    ),
    "an index that lacks a tensor": (lambda d: sharded(d, lambda m: m.pop(UP)), f"holds no {UP}"),
    "an index with the wrong shard": (
        lambda d: sharded(d, lambda m: m.update({DOWN: "part-0.safetensors"})),
        f"part-0.safetensors in .* does not hold {DOWN}, as its index says; part-1.safetensors does",
    ),
    "an index with a file that is not there": (
        lambda d: sharded(d, lambda m: m.update({DOWN: "part-2.safetensors"})),
        "lacks part-2.safetensors, which its index names",
    ),
    "an index that is no JSON": (text("model.safetensors.index.json", "{"), "index.json cannot be read"),
    "an index that is a list": (text("model.safetensors.index.json", "[]"), "index.json cannot be read"),
    "an index of numbers": (
        text("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        "index.json cannot be read",
    ),
    "a truncated file": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-99]),
        "model.safetensors cannot be read",
    ),
    "an empty file": (text("model.safetensors", ""), "model.safetensors cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a torn config": (text("config.json", '{"model_type": "lla'), "config.json cannot be read"),
    "a config that is a list": (text("config.json", "[]"), "config.json holds no JSON object"),
    "a config nested without end": (text("config.json", "[" * 100_000), "config.json cannot be read"),
    "a config that is no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json cannot be read",
    ),
    "no heads": (lambda d: configure(d, num_attention_heads=0), "config.json"),
    "a size that is a word": (lambda d: configure(d, hidden_size="many"), "config.json"),
    "a negative size": (lambda d: configure(d, intermediate_size=-1), "config.json"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cases")
    settings(place, "mha")
    return place


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_is_named_and_refused(base, tmp_path, capfd, name):
    change, said = QUANTISED[name]
    words = case(base, tmp_path, change)
    line = refusal(capfd, "evaluate", words)
    assert "is already quantised" in line
    assert "give the 16-bit model" in line
    with pytest.raises(UserError, match=said):
        open_model(str(tmp_path / "model"))


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_do_not_fit_the_config_are_refused_before_anything_is_computed(base, tmp_path, capfd, name):
    change, said = DAMAGED[name]
    words = case(base, tmp_path, change)
    with pytest.raises(UserError, match=said) as refused:
        open_model(str(tmp_path / "model"))
    assert refused.value.remedy
    line = refusal(capfd, "quantize", words)
    assert line == f"dist-spin: {refused.value}"


@pytest.mark.parametrize("stage", ["optimize", "evaluate", "export", "run"])
def test_every_stage_makes_the_check(base, tmp_path, capfd, stage):
    words = case(base, tmp_path, lambda d: sharded(d, lambda m: m.update({DOWN: "part-0.safetensors"})))
    more = ["export.target=hf"] if stage == "export" else []
    assert "does not hold" in refusal(capfd, stage, [*words, *more])


def test_a_wrong_model_path_is_refused_within_three_seconds(tmp_path):
    began = time.monotonic()
    command = [sys.executable, "-m", "dist_spin", "run", f"model.path={tmp_path}/nothing", f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert time.monotonic() - began < 3
    assert done.returncode == 2
    assert done.stderr == f"dist-spin: model directory {tmp_path}/nothing does not exist; check model.path\n"


def test_a_missing_head_is_said_and_the_embedding_used(base, tmp_path, capfd):
    words = case(base, tmp_path, without("lm_head.weight"))
    files = open_model(str(tmp_path / "model"))
    (note,) = files.notes
    assert "holds no lm_head.weight" in note
    assert torch.equal(files.weights.rows("lm_head.weight"), files.weights.rows("model.embed_tokens.weight"))
    capfd.readouterr()
    all_16 = [f"quant.{site}_bits=16" for site in "wakv"]
    assert main(["evaluate", *words, *all_16, "optimize.steps=0"]) == 0
    assert capfd.readouterr().err.count("holds no lm_head.weight") == 1


def test_a_tied_model_without_a_head_needs_no_word(tmp_path):
    write_model("gqa_tied", tmp_path)
    assert open_model(str(tmp_path)).notes == ()


def test_names_without_the_prefix_load_as_in_transformers(base, tmp_path):
    case(base, tmp_path, lambda d: rewrite(d, lambda t: {k.removeprefix("model."): v for k, v in t.items()}))
    files, original = open_model(str(tmp_path / "model")), open_model(str(base / "mha"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(files.weights.rows(name), parameter)
        assert torch.equal(files.weights.rows(name), original.weights.rows(name))
    assert files.notes == ()


def test_tensors_that_the_config_has_no_place_for_are_said(base, tmp_path):
    case(base, tmp_path, lambda d: configure(d, num_hidden_layers=1))
    (note,) = open_model(str(tmp_path / "model")).notes
    assert "not read: model.layers.1." in note
    shutil.rmtree(tmp_path / "model")
    case(
        base,
        tmp_path,
        lambda d: rewrite(d, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),
    )
    assert open_model(str(tmp_path / "model")).notes == ()
