"""What is learned does not depend on how many ranks learn it, and no rank holds more than its share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, command, one_step
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.distributed

SIZES = (1, 2, 3, 4)


def step(size: int, words: list[str], place: Path, *, reduce: bool = True) -> list[dict[str, Any]]:
    job = Job(size, one_step, [*words, f"output_dir={place}"], place / "out", reduce, log=place / "log")
    assert job.wait() == [0] * size, job.log.read_text()
    return [torch.load(place / "out" / f"{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def steps(words, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """Number of ranks -> what each of them saw in one step from the same rotations."""
    return {size: step(size, words, tmp_path_factory.mktemp(f"ranks{size}")) for size in SIZES}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("size", SIZES[1:])
def test_reduced_gradients_and_loss_are_those_of_one_rank(steps, size):
    alone = steps[1][0]
    assert alone["gradient"].norm() > 1e-2
    for seen in steps[size]:
        assert relative(seen["gradient"], alone["gradient"]) < 1e-12
        assert seen["loss"] == pytest.approx(alone["loss"], rel=1e-14)


@pytest.mark.parametrize("size", SIZES[1:])
def test_every_rank_holds_the_same_bits_after_a_step(steps, size):
    first = steps[size][0]
    for seen in steps[size][1:]:
        assert torch.equal(seen["gradient"], first["gradient"])
        for name, tensor in first["state"].items():
            assert torch.equal(seen["state"][name], tensor), name


def test_without_the_reduction_gradients_differ(words, steps, tmp_path):
    alone = steps[1][0]
    seen = step(2, words, tmp_path, reduce=False)
    for one in seen:
        assert relative(one["gradient"], alone["gradient"]) > 1e-2
    assert relative(seen[0]["gradient"], seen[1]["gradient"]) > 1e-2
    # What is missing is the sum and nothing else.
    assert relative(seen[0]["gradient"] + seen[1]["gradient"], alone["gradient"]) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_frozen_parameters_are_dtensors_with_their_share_of_the_bytes(steps, size):
    names = steps[size][0]["parameters"]
    assert len(names) > 20
    for name, (_, _, _, shape) in names.items():
        sharded, with_gradient, local, _ = zip(*(seen["parameters"][name] for seen in steps[size]), strict=True)
        whole, row = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
        assert all(sharded), name
        assert not any(with_gradient), name
        assert sum(local) == whole, name  # each number is held exactly once
        assert max(local) <= -(-shape[0] // size) * row, name


@pytest.mark.parametrize("size", SIZES)
def test_a_module_left_gathered_is_caught(steps, size):
    for seen in steps[size]:
        assert "layers.1." in seen["caught"]["layer"]
        assert "head." in seen["caught"]["head"]


def learned(size: int, words: list[str], place: Path, *more: str) -> dict[str, Tensor]:
    job = Job(size, command, "optimize", *words, f"output_dir={place}", *more, log=place / "log")
    assert job.wait() == [0] * size, job.log.read_text()
    return load_file(place / "run" / "rotations" / "final.safetensors")


def test_five_steps_lead_to_the_same_rotations(words, tmp_path_factory):
    results = {
        (size, micro): learned(
            size, words, tmp_path_factory.mktemp(f"learn{size}"), f"optimize.micro_batch_size={micro}"
        )
        for size, micro in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1))
    }
    alone = results.pop((1, 1))
    for how, rotations in results.items():
        for name in ("R1", "R2"):
            assert rotations[name].dtype == torch.float64
            assert (rotations[name] - alone[name]).abs().max() < 1e-9, (how, name)


ADAM = ("optimize.optimizer=cayley_adam", "optimize.lr=0.05", "optimize.steps=3")
TRANSFORMS = ("optimize.objective=mixed", "optimize.scales=true", "optimize.clips=true", "optimize.guard_every=2")


RANGE = ("rotation.init=range",)
STORED = (*TRANSFORMS, "optimize.teacher_top_k=8")


@pytest.mark.parametrize(
    "more", [(), RANGE, TRANSFORMS, STORED], ids=["rotations", "from ranges", "everything", "stored teacher"]
)
def test_adam_learns_the_same_on_two_ranks(words, tmp_path_factory, more):
    one, two = (learned(size, words, tmp_path_factory.mktemp(f"adam{size}"), *ADAM, *more) for size in (1, 2))
    assert len(one) == (8 if more in (TRANSFORMS, STORED) else 2)
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("grid", ["quant.w_mse_clip=true", "quant.w_symmetric=false"])
def test_learning_with_rounded_weights_is_the_same_on_any_number_of_ranks(words, grid, tmp_path_factory):
    more = ("optimize.w_bits=4", "optimize.steps=3", grid)
    alone, *others = (learned(size, words, tmp_path_factory.mktemp(f"w4-{size}"), *more) for size in (1, 2, 3))
    for rotations in others:
        for name in ("R1", "R2"):
            assert (rotations[name] - alone[name]).abs().max() < 1e-9


def test_blocks_are_learned_the_same_on_three_ranks(words, tmp_path_factory):
    """Eight blocks of R1, which three ranks do not divide, and rows of weights that begin within a block."""
    more = ("rotation.block=6", "rotation.r4_block=16", "optimize.w_bits=4", "optimize.steps=3")
    one, three = (learned(size, words, tmp_path_factory.mktemp(f"blocks{size}"), *more) for size in (1, 3))
    assert (one["R1"].shape, one["R2"].shape) == ((8, 6, 6), (2, 2, 6, 6))
    for name in ("R1", "R2"):
        assert (one[name] - three[name]).abs().max() < 1e-9, name
