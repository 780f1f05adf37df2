"""Processes of a tiny run are killed at random moments; whatever is killed, the same commands end with the same files."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_loop.py"
KILLS = 30


def test_killed_at_random_nothing_differs_hangs_or_is_left_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--kills", str(KILLS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    print(summary)
    assert f"{KILLS} kills (" in summary
    assert "0 differing artefacts, 0 hangs over 90 s, 0 leftovers, 0 orphans, 0 faults" in summary
