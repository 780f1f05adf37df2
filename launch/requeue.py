"""Whether a Slurm job whose stage has ended queues itself again.

    python -m dist_spin.launch.requeue CODE [SIGNALLED]

leaves with 0 if it does and with 1 if it does not. CODE: the stage's exit code. SIGNALLED: not empty if the job was signalled
meanwhile. SLURM_RESTART_COUNT and MAX_REQUEUES are read from the environment.
"""

import os
import sys

from dist_spin.errors import EXIT_HANG, EXIT_INTERRUPTED, EXIT_OK

MAX_REQUEUES = 5  # restarts after which a rank that hangs or dies ends the job for good


def should_requeue(code: int, *, signalled: bool = False) -> bool:
    """Whether the same command would continue where this one ended.

    It does where the ranks saved and left, and where they were signalled and could not save any more. It also does, up to
    MAX_REQUEUES times, where a rank did not answer the others, or was killed by a signal (exit codes above 128).
    """
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    limit = int(os.environ.get("MAX_REQUEUES", MAX_REQUEUES))
    if code == EXIT_INTERRUPTED or (signalled and code != EXIT_OK):
        return True
    return (code == EXIT_HANG or code > 128) and restarts < limit


if __name__ == "__main__":
    sys.exit(not should_requeue(int(sys.argv[1]), signalled=any(sys.argv[2:])))
