"""The same run under real launchers: torchrun on two "hosts", and `dist-spin run` with a signal to it."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import free_port
from safetensors.torch import load_file
from tiny import tiny_run

from dist_spin.runtime.processes import process_stat
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.checkpoints import checkpoints
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.distributed

PATIENCE = 120.0
LAUNCHERS = (b"torch.distributed.run", b"dist_spin.launch.torchrun")


@pytest.fixture
def words(tmp_path) -> list[str]:
    sizes = ("quantize.n_sequences=4", "optimize.batch_size=3")
    return tiny_run(tmp_path, *sizes, "optimize.steps=2000", sequences=40)  # ended by a signal, unless a test says less


def start(log: Path, *command: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen([sys.executable, "-m", *command], stdout=stream, stderr=stream)


def wait_for_step(place: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while max((found for found, _ in checkpoints(RunDir(place / "run"))), default=0) < step:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.005)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of a launcher's descendants that run a stage."""
    found, queue = [], [launcher]
    while queue:
        children = Path(f"/proc/{queue.pop()}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        queue += pids
        for pid in pids:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"optimize" in line and not any(name in line for name in LAUNCHERS):
                found.append(pid)
    return found


def test_two_hosts_under_torchrun_learn_what_one_process_learns(words, tmp_path):
    log, port = tmp_path / "log", free_port()
    agents = [
        start(
            tmp_path / f"log{host}",
            "torch.distributed.run",
            *("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
            *("--rdzv_id=test", "--local_addr=127.0.0.1", "-m", "dist_spin", "optimize", *words, "optimize.steps=6"),
            f"output_dir={tmp_path / 'two'}",
        )
        for host in range(2)
    ]
    alone = start(log, "dist_spin", "optimize", *words, "optimize.steps=6", f"output_dir={tmp_path / 'one'}")
    said = [tmp_path / "log0", tmp_path / "log1", log]
    codes = [process.wait(PATIENCE) for process in (*agents, alone)]
    assert codes == [0, 0, 0], "".join(file.read_text() for file in said)
    one, two = (load_file(tmp_path / name / "run" / "rotations" / "final.safetensors") for name in ("one", "two"))
    for name in ("R1", "R2"):
        assert (one[name] - two[name]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_run_reaches_the_ranks_and_the_same_command_continues(words, tmp_path, name):
    """dist-spin run: optimize on two ranks is stopped, continues, and the later stages follow."""
    command, log = ["dist_spin", "run", *words, f"output_dir={tmp_path}", "distributed.nproc=2"], tmp_path / "log"
    run = start(log, *command)
    wait_for_step(tmp_path, 2, run, log)
    ranks = ranks_of(run.pid)
    assert len(ranks) == 2
    run.send_signal(signal.Signals[name])
    assert run.wait(PATIENCE) == 75, log.read_text()
    said = log.read_text()
    assert said.count("dist-spin: stopped by a signal after step") == 1
    assert "Traceback" not in said
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]  # nobody is left behind
    if name == "SIGTERM":
        return
    run = start(log, *command, "optimize.steps=3000")  # and what is wrong is said in one line, with its own exit code
    assert run.wait(PATIENCE) == 2, log.read_text()
    assert [line for line in log.read_text().splitlines() if line and " INFO " not in line] == [
        "dist-spin: run run was started with optimize.steps = 2000 and now has 3000; "
        "use another name= for a new run, or set optimize.steps back"
    ]


def gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has waited for it."""
    stat = process_stat(pid)
    return stat is None or stat.ended


def listening(pid: int) -> set[str]:
    """The addresses at which a process listens, in the kernel's hexadecimal words."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.mark.parametrize("launcher", ["run", "torchrun"])
def test_ranks_die_with_their_launcher_and_the_same_command_continues_at_once(words, tmp_path, launcher):
    log = tmp_path / "log"
    command = ["dist_spin", "run", *words, f"output_dir={tmp_path}", "distributed.nproc=2"]
    if launcher == "torchrun":
        command = ["dist_spin.launch.torchrun", "--standalone", "--nproc_per_node=2", "-m", "dist_spin", "optimize"]
        command += [*words, f"output_dir={tmp_path}"]
    for step in (2, 20):  # the second start goes on where the first one was killed
        run = start(log, *command)
        wait_for_step(tmp_path, step, run, log)
        ranks = ranks_of(run.pid)
        assert len(ranks) == 2
        if launcher == "run":  # all its ranks are here, so nobody else can reach them
            assert {address for pid in ranks for address in listening(pid)} == {"0100007F"}
        run.kill()
        run.wait()
        end = time.monotonic() + 5
        while not all(gone(pid) for pid in ranks):
            assert time.monotonic() < end, "ranks outlive their launcher"
            time.sleep(0.01)
    assert [event["step"] for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "resume"]


def test_a_closed_terminal_is_a_request_to_stop(words, tmp_path):
    """The kernel sends SIGHUP, and what is printed afterwards has nowhere to go."""
    ours, terminal = pty.openpty()
    command = ["setsid", "--ctty", sys.executable, "-m", "dist_spin", "run", *words, f"output_dir={tmp_path}"]
    run = subprocess.Popen([*command, "distributed.nproc=2"], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    log, closing = tmp_path / "log", threading.Event()

    def read_terminal() -> None:
        with log.open("ab", buffering=0) as stream:
            while not closing.is_set():
                if select.select([ours], [], [], 0.1)[0]:
                    stream.write(os.read(ours, 4096))

    reader = threading.Thread(target=read_terminal)
    reader.start()
    try:
        wait_for_step(tmp_path, 2, run, log)
        ranks = ranks_of(run.pid)
        assert len(ranks) == 2
    finally:
        closing.set()
        reader.join()
        os.close(ours)
    try:
        assert run.wait(PATIENCE) == 75
    finally:
        run.kill()  # its ranks with it
    assert all(gone(pid) for pid in ranks)
    stopped = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "interrupted"]
    assert stopped[-1]["signal"] == "SIGHUP"
