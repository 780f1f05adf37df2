"""Layers of other methods are learned by whichever rank takes them, and come out the same."""

from pathlib import Path

import numpy as np
import pytest
from ranks import Job
from tiny import write_model

pytestmark = pytest.mark.distributed


def learn_both(words: list[str]) -> None:
    """What each rank does."""
    from dist_spin import distributed
    from dist_spin.config import load_config
    from dist_spin.stages.common import open_configured_model
    from dist_spin.stages.methods import learn

    config = load_config(None, words)
    world = distributed.start("cpu", threads=1)
    files = open_configured_model(config)
    for name in ("flatquant", "dartquant"):
        learn(config, world, files, name)
    distributed.stop()


def test_two_ranks_learn_what_one_does(tmp_path):
    write_model("gqa_tied", tmp_path / "model", layers=3)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 97, (8, 16)))
    words = [
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float64",
        f"quantize.source=tokens:{tmp_path / 'tokens.npy'}#all",
        "quantize.n_sequences=8",
        "quantize.seq_len=16",
        "methods.flat_epochs=2",
    ]
    found: list[dict[str, bytes]] = []
    for size in (1, 2):
        place = tmp_path / f"runs{size}"
        job = Job(size, learn_both, [*words, f"output_dir={place}"], log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        paths = sorted(place.rglob("*.safetensors"))
        found.append({str(path.relative_to(place)): path.read_bytes() for path in paths})
    assert [Path(name).name for name in found[0]].count("rotations.safetensors") == 1
    assert len(found[0]) == 4  # DartQuant's layers are gone once its rotations are there
    assert found[0] == found[1]
