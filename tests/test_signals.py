"""Signals end a process in order: one line, a documented exit code, no traceback, also while native code runs."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_spin.errors import EXIT_HANG
from dist_spin.launch import local_pipeline, next_stage

# A main thread in C, as in a collective: Python's own handlers would wait for it.
NATIVE = "import ctypes; print('ready', flush=True); ctypes.CDLL(None).sleep(30); ctypes.CDLL(None).sleep(30)"
WATCHING = f"from dist_spin.runtime import signals; signals.watch(); {NATIVE}"
LOOPING = """
import time
from dist_spin.runtime.signals import StopRequest
outer, inner = StopRequest(), StopRequest()
print("ready", flush=True)
while not outer:
    time.sleep(0.01)
print(outer.name, inner.name, flush=True)
time.sleep(30)
"""

JUST_FORKED = """
import os, signal
from dist_spin.runtime import signals
signals.watch()
print("ready", flush=True)
for _ in range(500):
    child = os.fork()
    if not child:
        signal.pause()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
print("all ended", flush=True)
"""


def python(code: str, **options: object) -> "subprocess.Popen[str]":
    """A Python that has printed its first line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGINT", 130)]
)
def test_before_there_is_anything_to_save_the_process_leaves_at_once(name, code):
    process = python(WATCHING)
    began = time.monotonic()
    process.send_signal(signal.Signals[name])
    said = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert time.monotonic() - began < 2
    assert said == f"dist-spin: stopped by {name}; the same command continues\n"


def test_of_several_ranks_the_first_one_speaks():
    process = python(WATCHING, env=os.environ | {"RANK": "1"})
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 75


def test_every_request_of_a_process_learns_of_a_signal_and_a_second_ctrl_c_ends_it():
    process = python(LOOPING)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "SIGINT SIGINT\n"
    process.send_signal(signal.SIGTERM)  # a scheduler may repeat itself
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert said.count("\n") == 1
    assert "dist-spin: ended at once by a second ctrl-C" in said


def test_a_signal_to_a_child_that_was_just_forked_ends_the_child_and_not_its_parent():
    process = python(JUST_FORKED)
    said, errors = process.communicate(timeout=60)
    assert (said, errors, process.returncode) == ("all ended\n", "", 0)


def test_a_process_under_nohup_is_not_ended_by_its_terminal():
    process = python(WATCHING, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_a_process_dies_with_the_one_that_started_it():
    child = f"from dist_spin.runtime import processes; processes.die_with_parent(); {NATIVE}"
    launcher = (
        "import os, subprocess, sys\nfrom dist_spin.runtime.processes import dependent_environment\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True,"
        " env=os.environ | dependent_environment())\n"
        "child.stdout.readline(); print('ready', flush=True); print(child.pid, flush=True); child.wait()"
    )
    process = python(launcher)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "start",
    ["from dist_spin.runtime import processes; processes.die_with_parent()", "import dist_spin.launch.fork_server"],
)
def test_a_process_whose_launcher_is_gone_already_does_not_begin(start):
    done = subprocess.run(
        [sys.executable, "-c", f"{start}; print('it began')"],
        env=os.environ | {"DIST_SPIN_PARENT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (4, "")


def test_a_fork_server_leaves_ctrl_c_to_its_launcher_from_the_start():
    process = python(f"import dist_spin.launch.fork_server; {NATIVE}")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == ""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("module", ["dist_spin", "dist_spin.launch.torchrun"])
def test_a_signal_while_importing_is_one_line(tmp_path, module, name):
    """At several moments of the seconds that the imports take, from when Python itself has started."""
    words = [] if module == "dist_spin" else ["--standalone", "--nproc_per_node=1", "-m", "dist_spin"]
    words += ["optimize", f"output_dir={tmp_path}", f"model.path={tmp_path}/no-model"]
    for delay in (0.0, 0.3, 0.8):
        process = subprocess.Popen([sys.executable, "-m", module, *words], stderr=subprocess.PIPE, text=True)
        while not watches(process.pid):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.Signals[name])
        said = process.communicate(timeout=30)[1]
        if process.returncode == 2:  # it was quicker: the model is not there
            continue
        assert process.returncode == (130 if name == "SIGINT" else 75), said
        assert said == f"dist-spin: stopped by {name}; the same command continues\n"


def watches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


FORKING = """
import os, signal
from dist_spin.runtime.signals import StopRequest

stop = StopRequest()
begun, begins = os.pipe()
child = os.fork()
if child == 0:
    os.write(begins, b".")
    signal.pause()
    os._exit(1)
os.read(begun, 1)
os.kill(child, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM, repr(stop.name))
"""


def test_the_signals_of_a_forked_process_are_its_own():
    """As of a library that ends its worker processes: they end, and the parent does not take itself for stopped."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "True ''\n"


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_wait_for_one_that_failed_are_stopped_and_its_exit_code_counts(monkeypatch, first):
    monkeypatch.setattr(local_pipeline, "NOTICE_S", 0.3)
    commands = [["sh", "-c", "exit 3"], ["sleep", "60"]]
    ranks = [subprocess.Popen(command) for command in (commands if first == 0 else commands[::-1])]
    began = time.monotonic()
    codes = local_pipeline.wait(ranks)
    assert time.monotonic() - began < 5
    assert sorted(codes) == [3, EXIT_HANG]
    assert local_pipeline.exit_code(codes, []) == 3


WAITING = """import os
from dist_spin.runtime.processes import wait_for_turn
os.write(1, b'ready\\n')
wait_for_turn()
os.write(1, b'begun\\n')
"""


def test_a_stage_that_was_prepared_begins_when_its_turn_comes(monkeypatch, capfd):
    monkeypatch.setattr(next_stage, "AFTER_S", 0.0)
    monkeypatch.setattr(next_stage, "PROCESS_BYTES", 0)
    start = functools.partial(local_pipeline.start_ranks, [sys.executable, "-c", WAITING], 2)

    def until_ready(said: str = "") -> None:
        end = time.monotonic() + 60
        while said != "ready\n" * 2:
            assert time.monotonic() < end, said
            time.sleep(0.05)
            said += capfd.readouterr().out

    with next_stage.NextStage() as following:
        following.prepare(start, 2)
        following.start_when_due()
        until_ready()
        time.sleep(0.2)
        assert capfd.readouterr().out == ""
        ranks = following.begin(start)
        assert local_pipeline.wait(ranks) == [0, 0]
        assert capfd.readouterr().out == "begun\n" * 2

        following.prepare(start, 2)  # one that is gone by then is started again, and so is the other
        following.start_when_due()
        lost, left = following._processes
        until_ready()
        lost.kill()
        lost.wait()
        assert local_pipeline.wait(following.begin(start)) == [0, 0]
        assert left.poll() is not None
        assert sorted(capfd.readouterr().out.splitlines()) == ["begun"] * 2 + ["ready"] * 2

        following.prepare(start, 2)
        following.start_when_due()
        waiting = following._processes
        until_ready()
        assert [process.poll() for process in waiting] == [None, None]
    assert [process.poll() for process in waiting] == [-signal.SIGKILL] * 2
    assert capfd.readouterr().out == ""


def test_little_memory_is_left_to_the_stage_at_work(monkeypatch):
    monkeypatch.setattr(next_stage, "AFTER_S", 0.0)
    monkeypatch.setattr(next_stage, "host_bytes_free", lambda: next_stage.MEMORY_SHARE * next_stage.PROCESS_BYTES)
    start = functools.partial(local_pipeline.start_ranks, ["true"])
    with next_stage.NextStage() as following:
        for nproc, started in ((2, 0), (1, 1)):
            following.prepare(functools.partial(start, nproc), nproc)
            following.start_when_due()
            assert len(following._processes) == started
