"""What runs inside a submitted job: a plain command in a process of its own, so that it meets a fresh interpreter."""

import os
import subprocess
import sys

# Where submitit's own variables would make the command think that it is one rank of several.
NOT_INHERITED = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")


def run_command(arguments: list[str]) -> int:
    """Run `dist-spin ARGUMENTS...`; returns its exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    command = [sys.executable, "-m", "dist_spin", *arguments]
    print(" ".join(command), flush=True)
    return subprocess.run(command, env=environment, check=False).returncode
