"""A start from activations under several ranks: the text is shared out, the rotations stay."""

import pytest
import torch
from ranks import Job, command
from tiny import tiny_run

from dist_spin.storage.atomic import read_lines
from dist_spin.storage.tensor_file import load_tensors

pytestmark = pytest.mark.distributed


def test_three_ranks_fit_what_one_fits(tmp_path):
    words = tiny_run(tmp_path, "optimize.steps=0", "rotation.init=range", sequences=40)
    ranges, starts = [], []
    for size in (1, 3):
        job = Job(size, command, "optimize", *words, f"name=of{size}", log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        (line,) = (x for x in read_lines(tmp_path / f"of{size}" / "events.jsonl") if x["event"] == "range_start")
        ranges.append([line["before"], line["after"]])
        starts.append(load_tensors(tmp_path / f"of{size}" / "rotations" / "start.safetensors")[0]["R1"])
    assert ranges[1] == pytest.approx(ranges[0], rel=1e-9)
    assert ranges[0][1] < ranges[0][0]
    torch.testing.assert_close(starts[1], starts[0], atol=1e-6, rtol=0)
