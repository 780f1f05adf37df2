"""Which exit codes make a Slurm job queue itself again, asked as the shell scripts and the submitted jobs ask."""

import os
import subprocess
import sys

import pytest

from dist_spin.errors import UserError
from dist_spin.launch.requeue import MAX_REQUEUES, should_requeue
from dist_spin.runtime import slurm


@pytest.mark.parametrize(
    ("code", "signalled", "restarts", "again"),
    [
        (75, "", 99, True),  # saved and left: as often as it takes
        (4, "", 0, True),  # a rank did not answer
        (137, "", MAX_REQUEUES - 1, True),  # a rank was killed
        (137, "", MAX_REQUEUES, False),
        (4, "", MAX_REQUEUES, False),
        (2, "", 0, False),
        (3, "", 0, False),
        (1, "yes", 0, True),  # the signal came before there was anything to save
        (0, "yes", 0, False),
        (0, "", 0, False),
    ],
)
def test_a_job_queues_again_where_the_same_command_continues(monkeypatch, code, signalled, restarts, again):
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    assert should_requeue(code, signalled=bool(signalled)) is again
    asked = [sys.executable, "-m", "dist_spin.launch.requeue", str(code), signalled]
    assert subprocess.run(asked, env=os.environ, check=False).returncode == (0 if again else 1)


def test_the_environment_says_how_often(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "6")
    monkeypatch.setenv("MAX_REQUEUES", "7")
    assert should_requeue(4)
    monkeypatch.setenv("MAX_REQUEUES", "6")
    assert not should_requeue(4)


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
@pytest.mark.parametrize("array", [False, True])
def test_a_cancelled_job_does_not_queue_again(monkeypatch, tmp_path, state, again, array):
    program = tmp_path / "squeue"  # as Slurm's answers: this job, and another task of its array that still waits
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '12{'_3' * array}|{state}|None' '12_4|PENDING|None'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "15" if array else "12")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert should_requeue(75) is again
    assert not should_requeue(2)


SIGNALLED_WHILE_WAITING = """
import os, signal, subprocess, threading
from dist_spin.launch.stage_job import StageJob

job = StageJob("optimize", [], ranks=1)
job.process = subprocess.Popen(["sleep", "100"])  # ends at the signal that ranks save at
signal.signal(signal.SIGUSR2, lambda *_: print("requeued", job.checkpoint().function.stage))
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
print(job.process.wait() == -signal.SIGUSR1)
"""


def test_a_job_whose_time_is_up_waits_for_its_ranks_and_not_for_itself():
    asked = [sys.executable, "-c", SIGNALLED_WHILE_WAITING]
    answered = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    assert answered.stdout.splitlines() == ["requeued optimize", "True"]


def test_a_stage_that_failed_speaks_for_itself_without_a_traceback():
    failing = "from dist_spin.launch.stage_job import StageJob; StageJob('optimize', ['none.yaml'], ranks=1)()"
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "local"}
    asked = [sys.executable, "-c", failing]
    ended = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "cannot read none.yaml: No such file" in ended.stderr
    assert "dist-spin optimize returned 2; its line above says why" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_scheduler_that_does_not_answer_costs_no_job_its_requeue(monkeypatch, tmp_path):
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\nexec sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(slurm, "ANSWERS_WITHIN", 0.2)
    assert should_requeue(75)
    with pytest.raises(
        UserError, match="Slurm does not answer"
    ):  # nothing that `cancel` or `submit` may take for ended jobs
        slurm.job_states(["12"])


@pytest.mark.parametrize(
    ("says", "known"),
    [("slurm_load_jobs error: Unable to contact slurm controller", False), ("Invalid job id specified", True)],
)
def test_a_scheduler_that_fails_is_told_from_one_that_has_forgotten_a_job(monkeypatch, tmp_path, says, known):
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\necho {says!r} >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if known:
        assert slurm.job_states(["12"]) == {}
    else:
        with pytest.raises(UserError, match="Unable to contact"):
            slurm.job_states(["12"])
