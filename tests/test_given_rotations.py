"""Rotations of a file, such as a published R.bin, applied and measured without learning (`optimize.steps=0`)."""

import json
from pathlib import Path

import pytest
import torch
from exported import settings
from torch import Tensor

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.storage.rotations import load_rotations

SHORT = ["evaluate.unquantized_weights=true", "quant.a_bits=8"]
KINDS = {"had": ["rotation.online=true"], "no-had": ["rotation.online=false"]}

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, and runs `had` and `no-had` on it whose rotations were learned."""
    place = tmp_path_factory.mktemp("given")
    for kind, online in KINDS.items():
        words = [*settings(place, "gqa_tied"), *SHORT, *online, f"name={kind}", "optimize.lr=0.5", "optimize.steps=2"]
        for stage in ("optimize", "quantize", "evaluate"):
            assert main([stage, *words]) == 0
    return place


def given(place: Path, file: Path, kind: str, name: str) -> list[str]:
    words = [*settings(place, "gqa_tied"), *SHORT, *KINDS[kind], f"name={name}"]
    return [*words, "optimize.steps=0", f"rotation.load={file}"]


def measured(place: Path, name: str) -> dict[tuple[str, str], float]:
    rows = json.loads((place / "runs" / name / "results.json").read_text())
    return {(r["rotation"], r["weights"]): r["ppl"] for r in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_measures_as_the_run_that_wrote_it(place, kind, capsys):
    words = given(place, place / "runs" / kind / "rotations" / "R.bin", kind, f"from-{kind}")
    assert main(["quantize", *words]) == 0
    assert main(["evaluate", *words]) == 0
    assert "given rotation" in capsys.readouterr().out
    found, wanted = measured(place, f"from-{kind}"), measured(place, kind)
    assert found == wanted  # R.bin holds fp32, and so do the rotations of a run in fp32
    assert wanted.keys() == {("none", "none"), ("learned", "none"), ("learned", "gptq")}


def test_it_is_the_file_that_is_measured(place):
    """Evaluation alone, 16-bit weights; other rotations measure otherwise, and had is not no-had."""
    found = {}
    for name, file, kind in (("a", "had", "had"), ("b", "no-had", "had"), ("c", "had", "no-had")):
        words = given(place, place / "runs" / file / "rotations" / "R.bin", kind, name)
        assert main(["evaluate", *words, "quantize.method=none"]) == 0
        found[name] = measured(place, name)["learned", "none"]
    assert found["a"] == measured(place, "had")["learned", "none"]
    assert len(set(found.values())) == 3


def test_without_a_file_the_random_start_is_measured(place):
    words = [*settings(place, "gqa_tied"), *SHORT, *KINDS["had"], "name=random", "quantize.baselines=[hadamard]"]
    words += ["optimize.steps=0", "quantize.method=none"]
    for stage in ("optimize", "evaluate"):
        assert main([stage, *words]) == 0
    found = measured(place, "random")
    assert found["learned", "none"] == found["hadamard", "none"]


def test_a_file_in_16_bits_is_made_orthogonal_again(place):
    source = torch.load(place / "runs" / "had" / "rotations" / "R.bin", weights_only=True)
    torch.save({name: tensor.bfloat16() for name, tensor in source.items()}, place / "half.bin")
    words = given(place, place / "half.bin", "had", "half")
    assert main(["evaluate", *words, "quantize.method=none"]) == 0
    r1, r2 = load_rotations(place / "runs" / "half" / "rotations" / "final.safetensors", 48, 12, 2)
    assert off(torch.load(place / "half.bin", weights_only=True)["R1"].double()) > 1e-4
    assert off(r1) < 1e-12
    assert off(r2) < 1e-12
    assert measured(place, "half")["learned", "none"] == pytest.approx(
        measured(place, "had")["learned", "none"], rel=2e-2
    )


def off(r: Tensor) -> float:
    return float((r @ r.mT - torch.eye(r.shape[-1], dtype=r.dtype)).abs().max())


def test_files_of_other_models_are_refused_in_one_line(place, capsys):
    source = torch.load(place / "runs" / "had" / "rotations" / "R.bin", weights_only=True)
    wide = {name: torch.eye(64 if name == "R1" else len(tensor)) for name, tensor in source.items()}
    deep = {**source, "model.layers.2.self_attn.R2": torch.eye(12)}
    for number, (tensors, what) in enumerate(((wide, "R1 (64, 64)"), (deep, "3 R2"))):
        torch.save(tensors, place / "foreign.bin")
        name = f"foreign-{number}"
        assert main(["evaluate", *given(place, place / "foreign.bin", "had", name), "quantize.method=none"]) == 2
        error = capsys.readouterr().err
        assert what in error
        assert error.count("\n") == 1
        assert not (place / "runs" / name / "rotations" / "final.safetensors").exists()


def test_a_run_keeps_the_rotations_it_has(place, capsys):
    words = given(place, place / "runs" / "had" / "rotations" / "R.bin", "had", "kept")
    assert main(["optimize", *words]) == 0
    assert main(["optimize", *words]) == 0
    other = given(place, place / "runs" / "no-had" / "rotations" / "R.bin", "had", "kept")
    capsys.readouterr()
    assert main(["optimize", *other]) == 2
    assert "run kept holds other rotations" in capsys.readouterr().err
    assert main(["optimize", *words, "optimize.steps=1"]) == 2
    assert "given, not learned" in capsys.readouterr().err
    learned = [*given(place, place / "runs" / "had" / "rotations" / "R.bin", "had", "had")]
    assert main(["evaluate", *learned, "quantize.method=none"]) == 2
    assert "run had holds other rotations" in capsys.readouterr().err


def test_steps_are_a_number():
    with pytest.raises(UserError, match=r"optimize\.steps is -1"):
        load_config(None, ["model.path=x", "optimize.steps=-1"])
    load_config(None, ["model.path=x", "optimize.steps=0"])
