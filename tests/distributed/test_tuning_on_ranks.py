"""Layers tuned by several ranks, each on its own sequences: all take the same steps, and every rank is needed."""

import numpy as np
import pytest
from ranks import Job
from tiny import write_model

from dist_spin.layer_files import layer_path, load_layer
from dist_spin.rundir import RunDir, read_lines

pytestmark = pytest.mark.distributed


def quantize_it(words: list[str]) -> None:
    """What each rank does."""
    from dist_spin import distributed
    from dist_spin.config import load_config
    from dist_spin.stages.quantize import quantize

    world = distributed.start("cpu", threads=1)
    quantize(load_config(None, words), world)
    distributed.stop()


def test_two_ranks_bring_the_output_nearer(tmp_path):
    write_model("gqa_tied", tmp_path / "model", layers=2)
    # 8 sequences for one rank, 7 for the other.
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 97, (15, 24)))
    words = [
        *(f"model.path={tmp_path / 'model'}", "model.dtype=float64", "optimize.steps=0", "rotation.init=hadamard"),
        *(f"quantize.source=tokens:{tmp_path / 'tokens.npy'}#all", "quantize.n_sequences=15", "quantize.seq_len=24"),
        *("quant.w_bits=3", "quant.a_bits=6", "quantize.tune_epochs=12"),
    ]
    last, codes = [], []
    for name, size, rate in (("still", 2, 1e-9), ("one", 1, 0.02), ("two", 2, 0.02), ("again", 2, 0.02)):
        more = [f"output_dir={tmp_path}", f"name={name}", f"quantize.tune_lr={rate}"]
        job = Job(size, quantize_it, [*words, *more], log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        run = RunDir(tmp_path / name)
        noted = [line for line in read_lines(run.path / "events.jsonl") if line["event"] == "tuned"]
        last.append(noted[-1]["last_epoch"])
        codes.append(load_layer(layer_path(run.layers(""), 1))[0].solutions["mlp.down_proj"].codes)
    assert last[1] < 0.8 * last[0]
    assert last[2] < 0.95 * last[0]  # with half as many steps
    assert (codes[2] == codes[3]).all()
    few = [*words, "quantize.n_sequences=1", f"output_dir={tmp_path}", "name=few"]
    job = Job(2, quantize_it, few, log=tmp_path / "log")
    assert all(job.wait())
    assert "raise quantize.n_sequences" in job.log.read_text()
