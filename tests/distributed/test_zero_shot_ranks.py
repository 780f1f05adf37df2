"""Zero-shot tasks under two ranks: the requests are shared out, the figures stay."""

import json

import pytest
import task_files
from ranks import Job, command
from tiny import write_letters, write_model

pytestmark = pytest.mark.distributed


def test_two_ranks_measure_what_one_measures(tmp_path):
    model = write_model("gqa_tied", tmp_path / "model")
    write_letters(model)
    task_files.write_piqa(tmp_path / "tasks", 7)
    task_files.write_lambada(tmp_path / "tasks", 5)
    words = [
        f"model.path={model}",
        "model.dtype=float32",
        "quant.w_bits=16",
        "rotation.r4_block=16",
        "optimize.source=pydoc",
        "optimize.seq_len=20",
        "optimize.steps=1",
        "optimize.batch_size=2",
        "evaluate.sources=[]",
        "evaluate.tasks=[piqa,siqa,lambada_openai]",
        f"evaluate.tasks_dir={tmp_path / 'tasks'}",
        "distributed.device=cpu",
        "distributed.threads=1",
    ]
    found = {}
    for size in (1, 2):
        mine = [*words, f"output_dir={tmp_path}", f"name=by{size}"]
        for verb in ("optimize", "evaluate"):
            job = Job(size, command, verb, *mine, log=tmp_path / f"{verb}{size}")
            assert job.wait() == [0] * size, job.log.read_text()
        assert job.log.read_text().count("siqa is left out") == 1
        found[size] = json.loads((tmp_path / f"by{size}" / "results.json").read_text())
    assert len(found[1]) == 2 * 4
    for one, two in zip(found[1], found[2], strict=True):
        assert {k: one[k] for k in ("task", "metric", "n", "method")} == {k: two[k] for k in ("task", "metric", "n", "method")}
        assert one["value"] == pytest.approx(two["value"], rel=1e-4)
