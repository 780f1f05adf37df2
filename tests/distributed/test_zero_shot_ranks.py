"""Zero-shot tasks under two ranks: the requests are shared out, the figures stay."""

import json
import shutil

import pytest
import task_files
from ranks import Job, command
from tiny import tiny_run, write_letters, write_model

pytestmark = pytest.mark.distributed


def test_two_ranks_measure_what_one_measures(tmp_path):
    model = write_model("gqa_tied", tmp_path / "model")
    write_letters(model)
    task_files.write_piqa(tmp_path / "tasks", 7)
    task_files.write_lambada(tmp_path / "tasks", 5)
    words = tiny_run(
        tmp_path,
        "model.dtype=float32",
        "quant.w_bits=16",
        "rotation.r4_block=16",
        "optimize.source=pydoc",
        "evaluate.sources=[]",
        "evaluate.tasks=[piqa,siqa,lambada_openai]",
        f"evaluate.tasks_dir={tmp_path / 'tasks'}",
    )
    alone = Job(1, command, "optimize", *words, log=tmp_path / "optimize")
    assert alone.wait() == [0], alone.log.read_text()
    found = []
    for size in (1, 2):
        job = Job(size, command, "evaluate", *words, log=tmp_path / "evaluate")
        assert job.wait() == [0] * size, job.log.read_text()
        assert job.log.read_text().count("siqa is left out") == 1
        found.append(json.loads((tmp_path / "run" / "results.json").read_text()))
        shutil.rmtree(tmp_path / "run" / "evaluations")
    names = [[(row["task"], row["metric"], row["n"], row["method"]) for row in rows] for rows in found]
    assert names[0] == names[1]
    assert len(names[0]) == 2 * 4
    one, two = ([row["value"] for row in rows] for rows in found)
    assert two == pytest.approx(one, rel=1e-4)
