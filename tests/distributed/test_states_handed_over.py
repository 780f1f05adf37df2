"""Hidden states go straight to the rank that works on from them: those that it would otherwise read from disk."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from ranks import Job
from tiny import tiny_run

pytestmark = pytest.mark.distributed


def hand_over(words: list[str]) -> None:
    """A rank of two: the first goes on from layer 2, the second from layer 4, each with all sequences."""
    from dist_spin.config.loader import load_config
    from dist_spin.quantize.stage import make_states, prepare_jobs
    from dist_spin.runtime import distributed
    from dist_spin.runtime.distributed import World
    from dist_spin.storage.hidden_states import HiddenStateFiles

    world = distributed.start("cpu", 30, 1)
    (job,) = prepare_jobs(load_config(None, words), world)
    layer, may_write, save = 4 if world.rank else 2, threading.Event(), HiddenStateFiles.save

    def slow(self: HiddenStateFiles, layer: int, chunk: int, hidden: torch.Tensor) -> None:
        assert layer < 4 or may_write.wait(60)
        save(self, layer, chunk, hidden)

    HiddenStateFiles.save = slow
    with contextlib.ExitStack() as writers:
        make_states(job, [0, 2, 4], {2: 0, 4: 1}, writers)
        assert list(job.handed) == [layer]  # at once, while the last are written
        assert job.stored.present(2)
        assert not job.stored.present(4)
        may_write.set()
        job.hidden_states.finish()
        assert job.stored.present(4)
    alone = dataclasses.replace(job, world=World(0, 1, world.local_rank, world.local_size, world.device))
    with distributed.apart():
        handed = alone.hidden_states.entering(layer)
        assert not job.handed  # its memory is given back
        stored = alone.hidden_states.entering(layer)
    assert len(handed) == len(stored) == 34
    assert all(map(torch.equal, handed, stored))
    distributed.any_rank(False)  # nobody leaves before both are done
    distributed.stop()


def test_each_rank_is_handed_what_its_first_range_starts_from(tmp_path):
    settings = ("name=run", "optimize.steps=0", "quantize.layers_per_job=2", "quantize.n_sequences=34")
    words = tiny_run(tmp_path, *settings, layers=6, sequences=40, split="#all")  # 12 files of three, the last of one
    job = Job(2, hand_over, words, log=tmp_path / "log")
    assert job.wait() == [0, 0], job.log.read_text()
