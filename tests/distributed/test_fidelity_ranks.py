"""Fidelity under two ranks: windows and prompts are shared out, the figures stay."""

import json
import shutil

import pytest
from ranks import Job, command
from tiny import tiny_run, write_letters

pytestmark = pytest.mark.distributed


def test_two_ranks_measure_what_one_measures(tmp_path):
    words = ("optimize.steps=0", "quantize.method=none", "quant.w_bits=16", "quantize.baselines=[none]")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\na b c\nx\n")
    words = (*words, f"evaluate.prompts={prompts}", "evaluate.prompt_tokens=6")
    words = tiny_run(tmp_path, *words, "evaluate.max_sequences=5", sequences=40)
    write_letters(tmp_path / "model")
    found, greedy = [], []
    for size in (1, 2):
        job = Job(size, command, "evaluate", *words, log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        rows = json.loads((tmp_path / "run" / "results.json").read_text())
        measured = [row for row in rows if "ppl" in row]
        found.append([row[name] for row in measured[1:] for name in ("kl", "kl_p99", "top1")])
        greedy.append([row[name] for row in rows if "prompts" in row for name in ("n", "greedy_first", "greedy_equal")])
        shutil.rmtree(tmp_path / "run" / "evaluations")
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert min(found[0]) > 0
    assert len(greedy[0]) == 6
    assert greedy[1] == pytest.approx(greedy[0])  # of three prompts, so that one rank has more than the other
    assert greedy[0][0] == 3
    assert min(greedy[0][1::3]) < 6
