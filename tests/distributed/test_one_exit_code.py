"""Where one rank fails, all ranks end with its exit code, and one line says why."""

import pytest
from ranks import Job, command
from safetensors.torch import load_file, save_file
from tiny import tiny_run

pytestmark = pytest.mark.distributed

BUG, FULL, WRONG, DAMAGED, STOPPED = "bug", "full", "wrong", "damaged", "stopped"


def fail_as_told(plan: dict[int, str]) -> int:
    """A rank that fails as `plan` says of it; returns its exit code."""
    import torch

    from dist_spin.cli import report_mistakes
    from dist_spin.errors import DamagedWeights, Interrupted, UserError
    from dist_spin.runtime import distributed

    errors = {
        BUG: ZeroDivisionError("a bug"),
        FULL: torch.OutOfMemoryError("Tried to allocate 2.00 GiB."),
        WRONG: UserError("what is wrong", "the remedy"),
        DAMAGED: DamagedWeights("w holds nan", "another download"),
        STOPPED: Interrupted("stopped by a signal", "the same command continues"),
    }
    world = distributed.start("cpu", 30, 1)

    def act() -> None:
        if world.rank in plan:
            raise errors[plan[world.rank]]

    code = report_mistakes(lambda: distributed.raise_on_any_failure(act))
    assert distributed.max_over_ranks(world.rank) == world.size - 1  # nobody is left behind in a collective
    distributed.stop()
    return code


@pytest.mark.parametrize(
    ("plan", "code", "line"),
    [
        ({}, 0, None),
        ({0: WRONG}, 2, "dist-spin: what is wrong; the remedy"),
        ({1: DAMAGED}, 3, ": w holds nan; another download"),
        ({1: DAMAGED, 2: WRONG}, 3, ": w holds nan; another download"),
        ({0: WRONG, 1: DAMAGED, 2: DAMAGED}, 2, "dist-spin: what is wrong; the remedy"),
        ({2: FULL}, 5, ": a GPU ran out of memory when 2.00 GiB were needed"),
        ({1: STOPPED}, 75, "dist-spin: stopped by a signal; the same command continues"),
        ({0: WRONG, 2: BUG}, 1, "dist-spin: rank 2 failed (its traceback says why); it is a bug of ours"),
    ],
)
def test_all_ranks_end_with_the_code_of_the_first_that_failed(tmp_path, plan, code, line):
    job = Job(3, fail_as_told, plan, log=tmp_path / "log")
    assert job.wait() == [code] * 3, job.log.read_text()
    lines = [text for text in job.log.read_text().splitlines() if text.startswith("dist-spin:")]
    assert len(lines) == (line is not None), lines
    if line is not None:
        assert line in lines[0].replace("more were needed", "were needed")
        mine = min(plan)
        assert lines[0].startswith(f"dist-spin: rank {mine} on ") == (mine > 0 and plan[mine] != STOPPED)


@pytest.mark.parametrize("stage", ["optimize", "quantize", "evaluate"])
def test_a_damaged_tensor_that_one_rank_reads_ends_all_with_its_code(tmp_path, stage):
    words = tiny_run(tmp_path, "optimize.steps=2" if stage == "optimize" else "optimize.steps=0")
    words += ["quantize.method=none", "quant.w_bits=16"] if stage == "evaluate" else []
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    if stage == "quantize":
        given = Job(1, command, "optimize", *words, log=tmp_path / "log")
        assert given.wait() == [0], given.log.read_text()
    job = Job(2, command, stage, *words, log=tmp_path / "log")
    assert job.wait() == [3, 3], job.log.read_text()
    lines = [text for text in job.log.read_text().splitlines() if "dist-spin:" in text]
    assert len(lines) == 1
    assert all("model.layers.1.mlp.up_proj.weight" in line for line in lines)
