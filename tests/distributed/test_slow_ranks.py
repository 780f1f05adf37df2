"""Ranks that work apart: one that waits is no longer waited for in vain, and one whose files are damaged ends all."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from ranks import PATIENCE, Job, command
from safetensors.torch import load_file, save_file
from tiny import tiny_run

pytestmark = pytest.mark.distributed

ROUNDS = 3


def meet_while_one_works(fails: bool) -> int:
    """A rank of two; the second is at work until the ranks have agreed ROUNDS times, and then fails or not."""
    from dist_spin.cli import report_mistakes
    from dist_spin.errors import UserError
    from dist_spin.runtime import distributed

    world, rounds, any_rank = distributed.start("cpu", 30, 1), 0, distributed.any_rank

    def counted(flag: bool) -> bool:
        nonlocal rounds
        agreed = any_rank(flag)
        rounds += 1
        return agreed

    distributed.any_rank = counted

    def work() -> None:
        assert distributed.group_size() == 1  # nothing that it calls waits for the other rank
        end = time.monotonic() + PATIENCE
        while world.rank == 1 and rounds < ROUNDS:
            assert time.monotonic() < end, "the ranks did not meet"
            time.sleep(0.001)
        if fails and world.rank == 1:
            raise UserError("what is wrong", "the remedy")

    code = report_mistakes(lambda: distributed.raise_on_any_failure(lambda: distributed.work_apart(work, 0.01)))
    assert rounds > ROUNDS  # on the rank that had nothing to do, too
    assert distributed.max_over_ranks(world.rank) == 1  # nobody is left behind in a collective
    distributed.stop()
    return code


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_agree_again_and_again_while_one_of_them_works(tmp_path, fails):
    job = Job(2, meet_while_one_works, fails, log=tmp_path / "log")
    assert job.wait() == [2 * fails] * 2, job.log.read_text()


def quantize_from(words: list[str], models: list[Path]) -> int:
    """A rank that quantises the model that lies on its own disk."""
    import os

    return command("quantize", *words, f"model.path={models[int(os.environ['RANK'])]}")


@pytest.mark.parametrize("per_job", [0, 2], ids=["layers", "hidden states"])
def test_a_file_that_is_damaged_for_one_rank_ends_all_with_its_code(tmp_path, per_job):
    words = tiny_run(tmp_path, "name=run", "optimize.steps=0", f"quantize.layers_per_job={per_job}", layers=4)
    sound, damaged = tmp_path / "model", tmp_path / "damaged"
    shutil.copytree(sound, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][1, 3] = torch.nan
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    job = Job(2, quantize_from, words, [sound, damaged], log=tmp_path / "log")
    assert job.wait() == [3, 3], job.log.read_text()
    (line,) = [text for text in job.log.read_text().splitlines() if "dist-spin:" in text]
    assert "rank 1 on " in line
    assert "model.layers.1.mlp.up_proj.weight holds nan at [1, 3]" in line


def start_three_times() -> int:
    """A rank of two whose second start fails on one of them alone, before it meets the other."""
    import os

    from dist_spin.errors import UserError
    from dist_spin.runtime import distributed

    world = distributed.start("cpu", 30, 1)
    distributed.stop()
    if world.rank == 1:
        os.environ["LOCAL_RANK"] = "99"  # has no GPU
        with pytest.raises(UserError):
            distributed.start("cuda", 30, 1)
    else:
        with pytest.raises(torch.distributed.DistStoreError):
            distributed.start("cpu", 1, 1)  # nobody comes
    os.environ["LOCAL_RANK"] = str(world.rank)
    distributed.start("cpu", 30, 1)
    assert distributed.max_over_ranks(world.rank) == 1
    distributed.stop()
    return 0


def test_ranks_meet_again_after_a_start_that_failed_on_one_of_them(tmp_path):
    job = Job(2, start_three_times, log=tmp_path / "log")
    assert job.wait() == [0, 0], job.log.read_text()
