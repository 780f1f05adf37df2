"""Block-diagonal rotations: the products and steps of their blocks are those of the whole matrices, in every part of a run."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cayley import NEVER, normal, optimizer, orthogonal, published_step, scales, seeds, skew, world
from test_model import CPU, WeightSide, learning_model, merged_logits, online_sites, reference_logits, relative
from test_weight_learning import StraightThrough, gridded_model
from tiny import tiny_run, write_model
from torch import Tensor, nn

from dist_spin.cli import main
from dist_spin.compare.plan import settings_of
from dist_spin.config.loader import load_config
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.model.rotation import Blocks, Rotations, initial, stored_rotations
from dist_spin.model.weight_quant import WeightQuantizer
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.block_rotation import (
    apply_rotation,
    apply_rotation_left,
    blocks_of,
    full_rotation,
    rotated_rows,
    rotation_gradient,
)
from dist_spin.numerics.cayley import orthogonality_error, retract_rows, step_size, tangent
from dist_spin.pipeline.variants import build_variant
from dist_spin.storage.results import without_blocks

assert world  # the fixture of test_cayley: a group of one rank

sizes = st.integers(2, 7)
counts = st.integers(1, 4)


@settings(deadline=None, max_examples=40)
@given(b=sizes, k=counts, repeats=counts, stacked=st.booleans(), rows=st.integers(0, 5), seed=seeds, data=st.data())
def test_products_with_blocks_are_those_of_the_whole_matrix(b, k, repeats, stacked, rows, seed, data):
    r = normal(k, b, b, seed=seed) if stacked else normal(b, b, seed=seed)
    n = repeats * b * (k if stacked else 1)
    whole = full_rotation(r, n)
    x, y = normal(2, rows, n, seed=seed + 1), normal(2, rows, n, seed=seed + 2)
    torch.testing.assert_close(apply_rotation(x, r), x @ whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apply_rotation(x, r.mT), x @ whole.T, rtol=1e-12, atol=1e-12)
    w = normal(n, rows, seed=seed + 3)
    torch.testing.assert_close(apply_rotation_left(r, w), whole.T @ w, rtol=1e-12, atol=1e-12)
    if not stacked or repeats == 1:
        start = data.draw(st.integers(0, n))
        part = slice(start, data.draw(st.integers(start, n)))
        found = rotated_rows(r, w, part, torch.float64)
        torch.testing.assert_close(found, (whole.T @ w)[part], rtol=1e-12, atol=1e-12)
    leaf = r.clone().requires_grad_()
    apply_rotation(x, leaf).backward(y)
    gradient = rotation_gradient(x, y, r.shape, torch.float64)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)
    places = blocks_of(torch.block_diag(*[normal(b, b)] * (n // b)), b)
    assert places.shape == (n // b, b, b)
    of_whole = torch.stack([(x.mT @ y).sum(0)[i : i + b, i : i + b] for i in range(0, n, b)])
    of_whole = of_whole.unflatten(0, (repeats, -1)).sum(0) if stacked else of_whole.sum(0)
    torch.testing.assert_close(gradient, of_whole, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 12), k=st.integers(1, 6), seed=seeds, scale=scales, lr=st.floats(1e-4, 10))
def test_a_step_on_blocks_is_that_of_each_block_alone_and_stays_orthogonal(n, k, seed, scale, lr):
    x, a = orthogonal(k, n, n, seed=seed), scale * skew(k, n, n, seed=seed + 1)
    alpha = step_size(x, a, lr)
    stepped = retract_rows(x, a, alpha)
    for i in range(k):
        torch.testing.assert_close(alpha[i], step_size(x[i], a[i], lr), rtol=1e-13, atol=0)
        torch.testing.assert_close(stepped[i], retract_rows(x[i], a[i], float(alpha[i])), rtol=0, atol=1e-13)
        gradient = a[i] @ x[i]
        torch.testing.assert_close(stepped[i], published_step(x[i], gradient, lr), rtol=0, atol=1e-12)
    # With B = alpha A / 2 the iterated transform misses the exact one by -2 B^7 (I - B)^-1, and |B| <= 1/2.
    missed = 2 * float((alpha[..., 0, 0] / 2 * torch.linalg.matrix_norm(a, 2)).max()) ** 7
    assert float(orthogonality_error(stepped)) <= 2 * missed + missed**2 + 1e-13


@pytest.mark.parametrize("kind", ["cayley_sgd", "cayley_adam"])
def test_the_optimiser_steps_every_block_as_an_optimiser_of_that_block_would(world, kind):
    r1, r2 = orthogonal(3, 8, 8), orthogonal(2, 4, 4, seed=1)
    ours = optimizer(r1, r2[:, None].repeat(1, 2, 1, 1), world, kind=kind, momentum=0.5, reproject_every=2)
    alone = [optimizer(r, r2, world, kind=kind, momentum=0.5, reproject_every=2) for r in r1]
    for step in range(3):
        a1, a2 = skew(3, 8, 8, seed=step), skew(2, 2, 4, 4, seed=9 + step)
        ours.rotations.lie_grad1.copy_(a1)
        ours.rotations.lie_grad2.copy_(a2)
        ours.step(0.05, ours.reduce_gradients())
        for i, one in enumerate(alone):
            one.rotations.lie_grad1.copy_(a1[i])
            one.rotations.lie_grad2.copy_(a2[:, i % 2])
            one.step(0.05, one.reduce_gradients())
    for i, one in enumerate(alone):
        torch.testing.assert_close(ours.rotations.r1[i], one.rotations.r1, rtol=0, atol=1e-13)
        torch.testing.assert_close(ours.rotations.r2[:, i % 2], one.rotations.r2, rtol=0, atol=1e-13)
    assert NEVER > 2


# head size 16 and hidden size 48: R2 in blocks as R1 is, or whole heads
BLOCKS = {"8": Blocks(8, 8), "16": Blocks(16, 0), "8 shared": Blocks(8, 8, shared=True), "24": Blocks(24, 0)}


@pytest.fixture(params=["mistral_window", "qwen3"])
def files(request, tmp_path) -> ModelFiles:
    return open_model(str(write_model(request.param, tmp_path)))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def whole(rotations: tuple[Tensor, Tensor], files: ModelFiles) -> tuple[Tensor, Tensor]:
    r1, r2 = rotations
    return full_rotation(r1, files.shape.hidden), torch.stack([full_rotation(r, files.shape.head_dim) for r in r2])


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "identity"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_initial_blocks_are_orthogonal_and_their_files_whole(files, kind, blocks):
    r1, r2 = initial(kind, files.shape, 3, blocks)
    assert r1.shape == ((8, 8) if blocks.shared else (48 // blocks.r1, blocks.r1, blocks.r1))
    assert max(float(orthogonality_error(r)) for r in (r1, r2)) < 1e-12
    if kind != "identity" and not blocks.shared:
        assert not torch.equal(r1[0], r1[1])  # each drawn by itself
    stored = stored_rotations(r1, r2, files.shape)
    assert stored[0].shape == (48 // blocks.r1, blocks.r1, blocks.r1)
    for ours, theirs in zip(whole(stored, files), whole((r1, r2), files), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_blocks_preserve_the_function_and_attached_ones_equal_merged_ones(files, ids, blocks):
    rotations = initial("orthogonal", files.shape, 3, blocks)
    full = reference_logits(files, ids, torch.float64)
    assert relative(merged_logits(files, rotations, online_sites(files, 16), ids, torch.float64), full) < 1e-9
    sites = online_sites(files, 4)
    with torch.no_grad():
        attached = learning_model(files, Rotations(*rotations, CPU, torch.float64), sites, torch.float64)(ids)
    logits = merged_logits(files, rotations, sites, ids, torch.float64)
    assert relative(logits, merged_logits(files, whole(rotations, files), sites, ids, torch.float64)) < 1e-9
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(attached, loss.view(2, -1).mean(-1), rtol=1e-9, atol=0)
    assert relative(logits, full) > 1e-3  # the quantisers really are on


@pytest.mark.parametrize("grid", [None, WeightQuantizer(4)], ids=["sites", "rounded weights"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_gradients_of_blocks_are_the_blocks_of_the_whole_gradient(files, ids, blocks, grid):
    r1, r2 = initial("hadamard", files.shape, 7, blocks)
    sites, rotations = (
        online_sites(files, 4),
        Rotations(r1, r2, CPU, torch.float64, learn=True, euclidean=grid is not None),
    )
    make = learning_model if grid is None else gridded_model
    loss = make(files, rotations, sites, torch.float64 if grid is None else grid)(ids).mean()
    loss.backward()
    rotations.to_lie_grad()
    full1, full2 = whole((r1, r2), files)
    oracle = (
        WeightSide(files, sites, full1, full2) if grid is None else StraightThrough(files, sites, full1, full2, grid)
    )
    oracle_loss = oracle(ids)
    oracle_loss.backward()
    torch.testing.assert_close(loss, oracle_loss, rtol=1e-9, atol=0)
    of_r1, of_r2 = tangent(oracle.r1.grad @ full1.T), tangent(oracle.r2.grad @ full2.mT)
    assert relative(tangent(rotations.lie_grad1), places(of_r1, r1)) < 1e-9
    expected = torch.stack([places(g, r) for g, r in zip(of_r2, r2, strict=True)])
    assert relative(tangent(rotations.lie_grad2), expected) < 1e-9


def places(gradient: Tensor, r: Tensor) -> Tensor:
    """Of a whole matrix the blocks that a rotation of r's shape has; their sum where it is one block [b, b]."""
    b = r.shape[-1]
    stack = torch.stack([gradient[i : i + b, i : i + b] for i in range(0, len(gradient), b)])
    return stack if r.dim() == 3 else stack.sum(0)


def run(place: Path, *more: str, verb: str = "optimize") -> int:
    return main([verb, *tiny_run(place, "name=run", "optimize.steps=3", *more, kind="qwen3")])


def final(place: Path) -> dict[str, Tensor]:
    return load_file(place / "run" / "rotations" / "final.safetensors")


@pytest.mark.parametrize("more", [(), ("rotation.block_shared=true",), ("optimize.w_bits=4", "rotation.init=identity")])
def test_a_run_learns_blocks_and_a_stopped_one_continues_to_the_same(tmp_path, more):
    words = ("rotation.block=8", *more)
    assert run(tmp_path, *words) == 0
    learned, published = final(tmp_path), torch.load(tmp_path / "run" / "rotations" / "R.bin", weights_only=True)
    assert learned["R1"].shape == (6, 8, 8)
    assert learned["R2"].shape == (2, 2, 8, 8)
    shared = "rotation.block_shared=true" in more
    assert torch.equal(learned["R1"], learned["R1"][:1].expand(6, 8, 8)) is shared
    assert float(orthogonality_error(learned["R1"])) < 1e-12
    assert torch.equal(published["R1"], torch.block_diag(*learned["R1"]).float())
    assert torch.equal(published["model.layers.1.self_attn.R2"], torch.block_diag(*learned["R2"][1]).float())
    checkpoint = load_file(tmp_path / "run" / "rotations" / "step_000002.safetensors")
    assert checkpoint["R1"].shape == ((8, 8) if shared else (6, 8, 8))
    for name in ("final.safetensors", "R.bin", "step_000003.safetensors"):
        (tmp_path / "run" / "rotations" / name).unlink()
    assert run(tmp_path, *words) == 0
    for name, tensor in final(tmp_path).items():
        assert torch.equal(tensor, learned[name])


@pytest.mark.parametrize("block", [8, 16])  # of half a head, and of a head: R2 is whole then
def test_a_shared_block_starts_from_ranges(tmp_path, block):
    words = [f"rotation.block={block}", "rotation.block_shared=true", "rotation.init=range", "optimize.steps=1"]
    assert run(tmp_path, *words) == 0
    learned = final(tmp_path)
    assert torch.equal(learned["R1"], learned["R1"][:1].expand(48 // block, block, block))
    assert learned["R2"].shape == ((2, 2, 8, 8) if block == 8 else (2, 16, 16))


def test_blocks_of_a_file_are_taken_up_and_other_files_refused(tmp_path, capsys):
    assert run(tmp_path, "rotation.block=8") == 0
    learned, r_bin = final(tmp_path), f"rotation.load={tmp_path / 'run' / 'rotations' / 'R.bin'}"
    for name, block, shape in (("same", 8, (6, 8, 8)), ("wider", 16, (3, 16, 16)), ("whole", 0, (48, 48))):
        assert run(tmp_path, f"name={name}", r_bin, f"rotation.block={block}", "optimize.steps=0") == 0
        loaded = load_file(tmp_path / name / "rotations" / "final.safetensors")
        assert loaded["R1"].shape == shape
        assert relative(full_rotation(loaded["R1"], 48), full_rotation(learned["R1"], 48)) < 1e-6
    capsys.readouterr()
    for more, said in (
        ("rotation.block=4", "R1 is not block-diagonal (an entry outside of the blocks of 4"),
        ("rotation.block_shared=true", "R1 has blocks that differ"),
    ):
        assert run(tmp_path, "name=refused", r_bin, "rotation.block=8", more) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rotation.block=32", "rotation.r4_block=16"), "hidden size 48 and head size 16"),
        (("rotation.block=12", "rotation.online=false"), "hidden size 48 and head size 16"),
        (("rotation.block=1",), "rotates nothing"),
        (("rotation.block=-8",), "rotation.block"),
        (("rotation.block_shared=true",), "set rotation.block"),
        (("rotation.block=48",), "rotation.block=48 does not divide this model's intermediate size 80"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, words, said):
    tiny_run(tmp_path, kind="qwen3")  # writes the model, which transformers tells of
    capsys.readouterr()
    assert run(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_tables_name_the_blocks_and_published_systems_have_none(tmp_path):
    words = tiny_run(tmp_path, "name=run", "rotation.block=8", "rotation.block_shared=true", kind="qwen3")
    config = load_config(None, words)
    files = open_model(str(tmp_path / "model"))
    labels = {}
    for method, variant in (("hadamard", "hadamard"), ("quarot", "quarot"), ("gptq", "none")):
        changed = settings_of(config, method, 0, "gptq")
        labels[method] = EvalTarget(build_variant(changed, files, variant, CPU), "gptq").label
    assert labels == {
        "hadamard": "random Hadamard, in one block of 8",
        "quarot": "random Quarot",
        "gptq": "no rotation",
    }
    assert without_blocks(labels["hadamard"]) == "random Hadamard"
    assert settings_of(config, "ours", 0, "gptq").rotation.block == 8
    assert settings_of(config, "spinquant_had", 0, "gptq").rotation.block == 0
