"""Fidelity under two ranks: windows are shared out, the figures stay."""

import json
import shutil

import pytest
from ranks import Job, command
from tiny import tiny_run

pytestmark = pytest.mark.distributed


def test_two_ranks_measure_what_one_measures(tmp_path):
    words = ("optimize.steps=0", "quantize.method=none", "quant.w_bits=16", "quantize.baselines=[none]")
    words = tiny_run(tmp_path, *words, "evaluate.max_sequences=5", sequences=40)
    found = []
    for size in (1, 2):
        job = Job(size, command, "evaluate", *words, log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        rows = json.loads((tmp_path / "run" / "results.json").read_text())
        found.append([row[name] for row in rows[1:] for name in ("kl", "kl_p99", "top1")])
        shutil.rmtree(tmp_path / "run" / "evaluations")
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert min(found[0]) > 0
