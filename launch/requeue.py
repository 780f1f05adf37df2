"""Whether a Slurm job whose stage has ended queues itself again.

    python -m dist_spin.launch.requeue CODE [SIGNALLED]

leaves with 0 if it does and with 1 if it does not. CODE: the stage's exit code. SIGNALLED: not empty if the job was signalled
meanwhile. SLURM_RESTART_COUNT, MAX_REQUEUES and the job's id are read from the environment.
"""

import os
import sys

from dist_spin.errors import EXIT_HANG, EXIT_INTERRUPTED, EXIT_OK, UserError
from dist_spin.runtime.slurm import job_states

MAX_REQUEUES = 5  # restarts after which a rank that hangs or dies ends the job for good


def should_requeue(code: int, *, signalled: bool = False) -> bool:
    """Whether the same command would continue where this one ended.

    It does where the ranks saved and left, and where they were signalled and could not save any more. It also does, up to
    MAX_REQUEUES times, where a rank did not answer the others, or was killed by a signal (exit codes above 128). It does not
    where somebody has cancelled the job.
    """
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    limit = int(os.environ.get("MAX_REQUEUES", MAX_REQUEUES))
    saved = code == EXIT_INTERRUPTED or (signalled and code != EXIT_OK)
    lost = (code == EXIT_HANG or code > 128) and restarts < limit
    return (saved or lost) and not being_cancelled()


def being_cancelled() -> bool:
    """Whether Slurm is already ending this job for good; a preempted one still counts as running."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    try:
        return bool(job) and job in (states := job_states([job])) and states[job].state != "RUNNING"
    except UserError:  # a scheduler too busy to answer must not cost the job its requeue
        return False


if __name__ == "__main__":
    sys.exit(not should_requeue(int(sys.argv[1]), signalled=any(sys.argv[2:])))
