"""`status`, `logs` and `cancel` of runs whose processes live, have died, or are on another machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_run

from dist_spin.cli import main
from dist_spin.report.cancel import StillAtWork, cancel
from dist_spin.report.holders import holders
from dist_spin.report.status import nothing_more_comes, status, what_stopped
from dist_spin.report.status_text import status_text
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.locks import here
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

# Holds a lock until it gets SIGTERM, which it notes as a stage does; with a second word, it does not heed SIGTERM.
HOLD = """
import signal, sys, time
from pathlib import Path
from dist_spin.storage.atomic import append_line
from dist_spin.storage.locks import Lock
run, what = Path(sys.argv[1]), sys.argv[2]
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
with Lock(run / "locks" / f"{what}.lock", what):
    print("held", flush=True)
    while not stopped or sys.argv[3:]:
        time.sleep(0.02)
    append_line(run / "events.jsonl", {"event": "interrupted", "stage": "optimize", "step": 7, "time": time.time()})
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was begun: its settings and one event."""
    run = RunDir(tmp_path / "tiny")
    run.path.mkdir()
    words = tiny_run(tmp_path, "name=tiny", "optimize.steps=5")
    (run.path / "config.yaml").write_text(settings_text(words))
    run.event("job", stage="optimize", part="", ranks=1, devices=["CPU"], python="3")
    return run


def settings_text(words: list[str]) -> str:
    from dist_spin.config.loader import dump_config, load_config

    return dump_config(load_config(None, words))


def hold(run: RunDir, what: str = "optimize", *words: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path), what, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def foreign_lock(run: RunDir, age: float = 0, **changes: object) -> Path:
    """A lock of a process on another machine, touched `age` seconds ago."""
    path = run.path / "locks" / "optimize.lock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({**here(), "what": "optimize", "token": "t", "since": time.time(), "machine": "other", **changes})
    )
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_status_names_the_process_and_no_time_before_the_first_step(run: RunDir) -> None:
    process = hold(run)
    figures = status(run.path)
    assert figures["optimize"]["seconds_left"] is None
    (holder,) = figures["holders"]
    assert holder == {**holder, "what": ["optimize"], "pid": process.pid, "state": "alive", "job": ""}
    assert figures["stopped"] is None
    text = status_text(figures)
    assert f"held by   optimize: process {process.pid} on {holder['host']}, for 0:" in text
    assert "step 0 of 5, the time left is known after the first step" in text
    assert "0:00 left" not in text
    process.kill()
    process.wait()
    figures = status(run.path)
    assert figures["holders"][0]["state"] == "ended"
    assert figures["stopped"]["stage"] == "optimize"
    text = status_text(figures)
    assert "step 0 of 5, not begun" in text
    assert "stopped   optimize: it ended before it was done" in text
    assert main(["status", str(run.path), "--watch"]) == 0  # there is nothing to wait for
    assert "it has ended, and the next start takes the run over" in text


def test_watching_goes_on_after_the_first_results_while_anybody_is_at_work(run: RunDir) -> None:
    process = hold(run, "export")
    figures = status(run.path) | {"results": [{"ppl": 7.0}]}
    assert not nothing_more_comes(figures)
    process.kill()
    process.wait()
    figures = status(run.path) | {"results": [{"ppl": 7.0}], "stopped": None}
    assert nothing_more_comes(figures)
    waiting = {"job": "12", "stage": "export", "state": "PENDING", "reason": "Dependency"}
    assert not nothing_more_comes(figures | {"jobs": [waiting]})
    assert nothing_more_comes(figures | {"jobs": [waiting | {"reason": "DependencyNeverSatisfied"}]})


@pytest.mark.parametrize("state", ["SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED"])
def test_a_job_that_slurm_will_go_on_with_has_not_stopped_the_run(run: RunDir, state: str) -> None:
    events, job = read_lines(run.path / "events.jsonl"), {"job": "12", "stage": "optimize", "reason": "None"}
    assert what_stopped(events, [], [job | {"state": state}]) is None
    assert what_stopped(events, [], [job | {"state": "TIMEOUT"}]) is not None


def test_status_tells_why_a_stage_has_ended(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tiny_run(tmp_path, "name=tiny", "quant.w_bits=16", "evaluate.seq_len=4096")
    (run.path / "config.yaml").unlink()
    assert main(["optimize", *words]) == 0
    assert status(run.path)["stopped"] is None
    assert main(["evaluate", *words]) == 2
    capsys.readouterr()
    assert main(["status", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "stopped   evaluate, 0:0" in said
    assert " ago: evaluate.seq_len=4096 is longer than the model's context of 128 tokens" in said
    run.event("stage_end", stage="evaluate", part="", outcome="done", seconds=1, peak_host_bytes=1)
    assert status(run.path)["stopped"] is None


def test_sequences_beside_the_models_context(run: RunDir, tmp_path: Path) -> None:
    figures = status(run.path)
    assert figures["sequence_lengths"] == {"optimize": 20, "quantize": 20, "evaluate": 20, "context": 128}
    assert "lengths   optimize 20, quantize 20, evaluate 20 tokens a sequence; the model takes 128" in status_text(
        figures
    )
    (run.path / "config.yaml").write_text(settings_text(tiny_run(tmp_path, "optimize.seq_len=129")))
    text = status_text(status(run.path))
    assert "warning   optimize.seq_len=129 is longer than the model's context of 128 tokens" in text
    (tmp_path / "model" / "config.json").unlink()
    assert status(run.path)["sequence_lengths"]["context"] is None


def test_cancel_ends_the_process_that_holds_the_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    process = hold(run)
    assert main(["cancel", str(run.path)]) == 0
    said = capsys.readouterr()
    assert process.wait(10) == 0
    assert f"asked optimize, process {process.pid} on " in said.err
    assert f"ended optimize, process {process.pid} on " in said.out
    assert "step 7 is saved; the same command continues" in said.out
    (event,) = [line for line in read_lines(run.path / "events.jsonl") if line["event"] == "cancelled"]
    assert event["processes"] == [{"host": here()["host"], "pid": process.pid}]
    assert main(["cancel", str(run.path)]) == 0
    assert capsys.readouterr().out == "nothing of this run is waiting or running\n"


def test_cancel_asks_the_launcher_alone(run: RunDir) -> None:
    stage, launcher = hold(run, "optimize", "deaf"), hold(run, "run")
    with pytest.raises(StillAtWork, match=rf"optimize, process {stage.pid} on .* is still at work"):
        cancel(run.path, wait_s=0.3)
    assert launcher.wait(10) == 0
    stage.kill()
    stage.wait()
    assert "has ended without releasing the run" in cancel(run.path)


def test_cancel_leaves_other_processes_alone(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    # Its number is in the lock, but it began at another time: the holder has ended and its number was given away.
    path = foreign_lock(run, pid=bystander.pid, machine=here()["machine"], began=1)
    assert main(["cancel", str(run.path)]) == 0
    assert "has ended without releasing the run" in capsys.readouterr().out
    # Of another machine, the same number says nothing here.
    foreign_lock(run, pid=bystander.pid, host="elsewhere")
    assert holders(run.path)[0].state == "elsewhere"
    assert main(["cancel", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert "is at work on another machine" in said
    assert f"give the same command on elsewhere, or `kill {bystander.pid}` there" in said
    foreign_lock(run, age=120, pid=bystander.pid, host="elsewhere")
    assert main(["cancel", str(run.path)]) == 0
    assert "no sign of it" in status_text(status(run.path))
    path.write_text('{"pid": "1", "host": 3}')
    assert holders(run.path) == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_process_that_does_not_heed_is_named_and_has_an_exit_code(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold(run, "optimize", "deaf")
    with pytest.raises(StillAtWork, match="finishes its step or layer first") as raised:
        cancel(run.path, wait_s=0.2)
    assert raised.value.exit_code == 4
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_each_log_once(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(run.path)]) == 0
    assert "no job has printed anything yet" in capsys.readouterr().out
    run.logs.mkdir()
    (run.logs / "a.out").write_text("from a job\n" * 30)
    (run.logs / "latest.out").symlink_to("a.out")
    monkeypatch.chdir(run.path.parent)
    assert main(["logs", "tiny"]) == 0
    said = capsys.readouterr().out
    assert said.count("==> ") == 1
    assert said.count("from a job") == 20


def test_jobs_of_a_slurm_that_does_not_answer_are_not_taken_for_ended(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    run.event("submitted", stage="optimize", job="12", part=[])
    assert main(["status", str(run.path)]) == 0
    assert "12 optimize: unknown" in capsys.readouterr().out
    assert main(["cancel", str(run.path)]) == 2
    assert "Unable to contact slurm controller; try again when `squeue` works" in capsys.readouterr().err
