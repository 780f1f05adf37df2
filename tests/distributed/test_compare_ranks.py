"""A comparison on two ranks, one of which is asked to stop: both leave, and continuing gives what one rank measures."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from ranks import Job, command
from tiny import write_model

from dist_spin.errors import EXIT_INTERRUPTED

pytestmark = pytest.mark.distributed


def test_two_ranks_measure_what_one_does(tmp_path):
    model = write_model("gqa_tied", tmp_path / "model")
    np.save(model / "tokens.npy", np.random.default_rng(0).integers(3, 97, (60, 20)))
    source = f"tokens:{model / 'tokens.npy'}"
    words = [
        *(f"model.path={model}", "model.dtype=float64", f"output_dir={tmp_path}"),
        *(f"{stage}.seq_len=20" for stage in ("optimize", "quantize", "evaluate")),
        *(f"optimize.source={source}", "optimize.batch_size=2", "optimize.steps=1"),
        *(f"quantize.source={source}", "quantize.n_sequences=8", f"evaluate.sources=[{source}]"),
        *("compare.methods=[gptq, smoothquant, quarot, spinquant_no_had, ours]", "compare.seeds=[0]"),
        *("compare.weights=[rtn]", "compare.bits=[W4A8, W4A4KV4]"),
        *("distributed.device=cpu", "distributed.threads=1"),
    ]

    def rows(name: str) -> dict[tuple, float]:
        found = json.loads(Path(tmp_path, name, "results.json").read_text())
        return {(r["system"], r["weights"], r["a_bits"]): r["ppl"] for r in found}

    job = Job(2, command, "compare", "name=two", *words, log=tmp_path / "log")
    job.wait_for(lambda: len(list((tmp_path / "two" / "evaluations").glob("*.json"))) >= 3)
    job.signal(signal.SIGTERM, 1)
    assert job.wait() == [EXIT_INTERRUPTED] * 2, job.log.read_text()
    assert 3 <= len(rows("two")) < 11
    assert Job(2, command, "compare", "name=two", *words, log=tmp_path / "log").wait() == [0, 0]
    assert Job(1, command, "compare", "name=one", *words, log=tmp_path / "log1").wait() == [0]
    one, two = rows("one"), rows("two")
    assert len(one) == len(two) == 11
    for key, ppl in one.items():
        assert two[key] == pytest.approx(ppl, rel=1e-9), key
