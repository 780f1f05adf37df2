"""Paths of settings: `~` and relative ones are the same everywhere, and a run's config.yaml holds from any directory."""

import os
from pathlib import Path

import pytest
from tiny import tiny_run, write_model

import dist_spin
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig

pytestmark = pytest.mark.usefixtures("restored_process")


def config(*words: str) -> RunConfig:
    return load_config(None, ["model.path=m", *words])


def test_paths_are_taken_as_the_operating_system_wants_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    here, there = config(), config("base_dir=/data")
    assert (here.path("~/x"), here.path("x"), here.path("/x")) == ("/home/me/x", "x", "/x")
    assert (there.path("~/x"), there.path("x"), there.path("/x")) == ("/home/me/x", "/data/x", "/x")
    assert there.source("text:~/a.txt,b.txt#all") == "text:/home/me/a.txt,/data/b.txt#all"
    assert there.source("tokens:t,x.npy") == "tokens:/data/t,x.npy"
    assert there.source("hf:./local:conf:text") == "hf:/data/./local:conf:text"
    for name in ("pydoc", "wikitext2", "self", "hf:owner/name:text"):
        assert there.source(name) == name
    assert config(f"base_dir={tmp_path}", "model.path=m").model_path == "m"  # the working directory itself
    assert config(f"base_dir={tmp_path.parent}", f"model.path={tmp_path.name}/m").model_path == str(tmp_path / "m")
    for name in ("owner/name", "package:some"):
        assert config("base_dir=/data", f"model.path={name}").model_path == name
    assert config("base_dir=/data", "model.path=~/m.gguf").model_path == "/home/me/m.gguf"
    assert config("base_dir=..").with_base_dir().base_dir == str(tmp_path.parent)


def test_a_run_of_relative_paths_is_continued_and_exported_from_another_directory(tmp_path, monkeypatch, capsys):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir(parents=True)
    write_model("gqa_tied", project / "model")
    words = tiny_run(project, "model.dtype=float32", "rotation.online=false", "name=r", model=project / "model")
    words = [word.replace(f"{project}/", "").replace(str(project), "runs") for word in words]
    assert "model.path=model" in words
    monkeypatch.chdir(project)
    for stage in ("optimize", "quantize"):
        assert main([stage, *words]) == 0
    run = project / "runs" / "r"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    noted = load_config(str(run / "config.yaml"), [])
    assert noted.base_dir == str(project)
    assert noted.optimize.source == "tokens:model/tokens.npy"  # as typed: it names the text in tables and fingerprints

    monkeypatch.chdir(elsewhere)
    assert main(["export", str(run), "--format", "hf"]) == 0
    (row, *_) = dist_spin.Run(run, quiet=True).evaluate()
    assert row["dataset"] == "tokens:model/tokens.npy"
    assert main(["quantize", os.path.relpath(run / "config.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(elsewhere.iterdir()) == []


def test_a_tilde_is_the_home_directory_for_model_text_runs_and_rotations(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(Path("/"))
    words = tiny_run(tmp_path, "model.dtype=float32", "name=first")
    words = [word.replace(str(tmp_path), "~") for word in words]
    assert "model.path=~/model" in words
    assert main(["optimize", *words]) == 0
    assert (tmp_path / "first" / "rotations" / "R.bin").exists()
    assert main(["optimize", *words, "name=second", "rotation.load=~/first/rotations/R.bin", "optimize.steps=0"]) == 0
    assert (tmp_path / "second" / "rotations" / "final.safetensors").exists()
