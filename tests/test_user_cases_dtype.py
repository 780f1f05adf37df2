"""`model.dtype=auto`: what the machine computes fast when a run starts, and the same on any machine afterwards."""

import json
from pathlib import Path

import pytest
import yaml
from exported import NO_HAD, exported, settings
from user_cases import refusal

import dist_spin
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.pipeline import dtype
from dist_spin.pipeline.model import model_dtype

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Settings of a run that leave the number format to the machine."""
    return [*settings(tmp_path, "gqa_tied", *NO_HAD), "model.dtype=auto"]


@pytest.fixture
def machine(monkeypatch):
    """Moves to a machine whose processor computes bfloat16 fast, or does not."""
    return lambda *, fast: monkeypatch.setattr(dtype, "bf16_is_fast", lambda: fast)


def recorded(run: Path) -> list[str]:
    fingerprint = json.loads((run / "fingerprint.json").read_text())["model.dtype"]
    return [fingerprint, yaml.safe_load((run / "config.yaml").read_text())["model"]["dtype"]]


@pytest.mark.parametrize(("fast", "name"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_keeps_the_format_it_was_started_with(words, tmp_path, machine, capfd, fast, name):
    run = tmp_path / "runs" / "run"
    capfd.readouterr()
    machine(fast=fast)
    assert main(["optimize", *words]) == 0
    assert capfd.readouterr().err.count(f"model.dtype=auto: {name}, since") == 1
    assert recorded(run) == [name, name]
    machine(fast=not fast)
    assert main(["optimize", *words]) == 0
    assert main(["quantize", *words]) == 0
    assert main(["evaluate", *words]) == 0
    assert "model.dtype=auto" not in capfd.readouterr().err
    assert recorded(run) == [name, name]
    directory = exported(words, "hf")
    assert json.loads((directory / "config.json").read_text())["dtype"] == name
    assert f"| Number format | {name} |" in (directory / "README.md").read_text()
    assert str(dist_spin.load(directory, device="cpu").dtype) == f"torch.{name}"
    other = "float32" if fast else "bfloat16"
    assert f"was started with model.dtype = '{name}' and now has '{other}'" in refusal(
        capfd, "optimize", [*words, f"model.dtype={other}"]
    )


def test_a_run_that_was_started_as_bfloat16_stays_so(words, tmp_path, machine):
    assert main(["optimize", *words, "model.dtype=bfloat16"]) == 0
    before = (tmp_path / "runs" / "run" / "fingerprint.json").read_bytes()
    machine(fast=False)
    assert main(["optimize", *words]) == 0
    assert main(["quantize", *words]) == 0
    assert (tmp_path / "runs" / "run" / "fingerprint.json").read_bytes() == before


def test_a_fan_out_notes_the_format_that_its_jobs_take(words, tmp_path, machine, capfd):
    words = [*words, "optimize.steps=0"]  # so that no fingerprint.json tells it
    machine(fast=False)
    assert main(["quantize", *words]) == 0
    settings_file = tmp_path / "runs" / "run" / "config.yaml"
    settings_file.unlink()
    capfd.readouterr()
    assert main(["quantize", *words, "--cluster", "local", "--workers", "1"]) == 0
    assert "model.dtype=auto: float32, since" in capfd.readouterr().err
    assert yaml.safe_load(settings_file.read_text())["model"]["dtype"] == "float32"


@pytest.mark.parametrize("damage", ["{", "[]", '{"model.dtype": 3}', '{"model.dtype": "int4"}'])
def test_a_fingerprint_that_says_nothing_leaves_it_to_the_settings_beside_it(words, tmp_path, machine, damage):
    machine(fast=False)
    assert main(["optimize", *words]) == 0
    (tmp_path / "runs" / "run" / "fingerprint.json").write_text(damage)
    machine(fast=True)
    config = load_config(None, words)
    assert dtype.dtype_name(config) == "float32"
    assert str(model_dtype(config)) == "torch.float32"
    (tmp_path / "runs" / "run" / "config.yaml").write_text("model: [")
    assert dtype.dtype_name(config) == "bfloat16"


def test_the_format_is_left_to_the_machine_unless_it_is_set():
    assert load_config(None, ["model.path=x"]).model.dtype == "auto"
    assert load_config("configs/quickstart.yaml", []).model.dtype == "auto"
