"""`dist-spin submit` without a scheduler, in the background and in the terminal, and `status --watch` beside it."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_spin.cli import main
from tests.slurm.harness import ROOT, Run
from tests.tiny import write_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("restored_process")]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = write_model("gqa_tied", tmp_path / "model")
    return Run(tmp_path, model, optimize__steps=3, quantize__layers_per_job=1)


def on_a_terminal(*words: str) -> str:
    """What a command writes to a terminal until it ends."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "dist_spin", *words], stdout=writer, env=environment) as process:
        os.close(writer)
        said = b""
        while True:
            try:
                said += os.read(reader, 1 << 16)
            except OSError:  # Linux says so when the last writer has left
                break
    os.close(reader)
    assert process.returncode == 0
    return said.decode()


def test_local_runs_in_the_background_and_can_be_watched(run, capsys):
    began = time.monotonic()
    assert main(["submit", str(run.config), "--cluster", "local"]) == 0
    assert not (run.path / "results.json").exists()  # the terminal is free before the work is done
    assert f"process {run.events('submitted')[0]['job'].removeprefix('local-')}" in capsys.readouterr().err
    screens = on_a_terminal("status", str(run.path), "--watch").split("\033[H\033[J")[1:]
    assert len(screens) > 1, (screens, time.monotonic() - began)
    assert "result" not in screens[0]
    assert "result    learned rotation, gptq weights" in screens[-1]
    assert "complete" in screens[-1]
    assert [row["method"] for row in run.results] == ["full precision", "learned rotation"]
    assert main(["status", str(run.path), "--watch", "--json"]) == 0  # complete: it shows the figures and ends
    assert json.loads(capsys.readouterr().out)["results"] == run.results
    assert main(["logs", str(run.path)]) == 0
    assert "wrote" in capsys.readouterr().out


def test_cancel_ends_a_run_of_this_machine(tmp_path, capsys):
    run = Run(tmp_path, write_model("gqa_tied", tmp_path / "model"), optimize__steps=1_000_000)
    assert main(["submit", str(run.config), "--cluster", "local"]) == 0
    deadline = time.monotonic() + 120
    while run.step < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert "run: RUNNING" in text
    assert "held by   run: process " in text
    assert "held by   optimize: process " in text
    assert main(["cancel", str(run.path)]) == 0
    step = run.events("interrupted")[0]["step"]
    assert f"step {step} is saved; the same command continues" in capsys.readouterr().out
    assert main(["status", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert "stopped   optimize, 0:" in text
    assert f" ago: stopped by a signal after step {step}; the same command continues" in text
    assert "held by" not in text
    assert main(["cancel", str(run.path)]) == 0
    assert capsys.readouterr().out == "nothing of this run is waiting or running\n"


def test_debug_runs_in_the_terminal_and_hands_on_the_exit_code(run, capsys):
    assert main(["submit", str(run.config), "--cluster", "debug"]) == 0
    assert [row["method"] for row in run.results] == ["full precision", "learned rotation"]
    assert main(["submit", str(run.config), "--cluster", "debug", "optimize.lr=0.5"]) == 2  # another run under its name
    assert main(["submit", str(run.config), "--cluster", "debug", "--slurm", "time=9"]) == 2
    assert "--slurm is for --cluster slurm" in capsys.readouterr().err
    assert main(["submit", str(run.config), "--cluster", "moon"]) == 2
