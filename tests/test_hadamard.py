"""Hadamard matrices: exact in integers, the same on every path, and the same as in every release before."""

import functools
import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_spin.numerics import hadamard_transform as transform
from dist_spin.numerics.hadamard import NoHadamard, hadamard_core, hadamard_matrix, largest_block
from dist_spin.numerics.hadamard_transform import (
    hadamard_transform,
    kronecker_apply,
    kronecker_factors,
    library_gap,
    online_transform,
)
from dist_spin.numerics.random_rotations import random_hadamard, random_orthogonal

# Hidden, intermediate and head sizes of Llama, Mistral, Qwen and SmolLM, with the core that each must have.
SIZES = {
    64: 1, 80: 20, 96: 12, 128: 1, 256: 1, 576: 36, 768: 12, 896: 28, 960: 60, 1024: 1, 1408: 44, 1536: 12, 2048: 1,
    2560: 20, 2816: 44, 3072: 12, 3584: 28, 4096: 1, 4864: 76, 5120: 20, 5504: 172, 5632: 44, 6144: 12, 6656: 52,
    6912: 108, 8192: 1, 8960: 140, 9216: 36, 9728: 76, 11008: 172, 11264: 44, 12288: 12, 13824: 108, 14336: 28,
    16384: 1, 17408: 68, 17920: 140, 18944: 148, 20480: 20, 22016: 172, 24576: 12, 25600: 100, 27648: 108, 28672: 28,
    29568: 3696, 32768: 1, 49152: 12, 53248: 52,
}  # fmt: skip

# First hex digits of the SHA-256 of each core as int8 in row-major order. A rotation folded into saved weights is
# undone by a transform that is built anew, so a released core must never change: add to this list, do not edit it.
DIGESTS = {
    12: "96c4e95b8f52", 20: "e5d1e5dd2879", 28: "f156de3682c3", 36: "1a7aed2f42a8", 44: "f67bcf7e314a",
    52: "f50db5d0f937", 60: "249ae98f2229", 68: "8e91c3b174eb", 76: "290dc2c593bb", 84: "fcb0d169a95b",
    92: "28013559b555", 100: "89d400ecb6ea", 108: "1ec1116b816c", 116: "f6b2c7d186ef", 140: "6f6c84c918ab",
    148: "1a8964dfe75c", 156: "3e3ff0d2a2c9", 164: "254202513c27", 172: "3002e6942561", 180: "d36aff58f0f6",
    244: "129e3db9f606", 252: "5c29a03156c2", 260: "e417b3e28d16", 268: "a499993ca03f", 284: "53149ddc3d64",
    292: "f6ef1a3f16ee", 300: "76725178c616", 404: "a1c93e47c8a2", 452: "0b38846cc0aa", 508: "5f6891f8ac9d",
    540: "07be02335bed", 684: "ac2c24dbe721", 924: "43a042d7e9d5", 1904: "07b2744f0456", 3696: "fdbdce353295",
}  # fmt: skip

# A single dense factor, two Sylvester factors, Paley cores over a prime and over GF(25), circulants, blocks of a width.
SHAPES = [(1, 0), (2, 0), (64, 0), (128, 0), (512, 0), (1024, 256), (12, 0), (96, 0), (416, 0), (1376, 0), (2048, 0),
          (4096, 2048), (1344, 448), (30, 2), (15, 1)]  # fmt: skip


def is_hadamard(matrix: Tensor) -> bool:
    """Exact: every partial sum of +-1 products is an integer far below 2^53."""
    n = len(matrix)
    h = matrix.to(torch.float64)
    return bool((matrix.abs() == 1).all()) and torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


def dense(n: int, block: int) -> Tensor:
    """I (x) H_block / sqrt(block) in float64, from the integer matrix."""
    block = block or n
    return torch.kron(torch.eye(n // block, dtype=torch.float64), hadamard_matrix(block).double() / math.sqrt(block))


@pytest.mark.parametrize(("n", "core"), SIZES.items())
def test_every_model_size_has_its_core(n: int, core: int) -> None:
    assert hadamard_core(n) == (core, n // core)
    assert largest_block(n) == n
    assert core == 1 or core in DIGESTS


@pytest.mark.parametrize(("order", "digest"), DIGESTS.items())
def test_core_is_exact_and_never_changes(order: int, digest: str) -> None:
    core = hadamard_matrix(order)
    assert core.dtype == torch.int8
    assert hadamard_core(order) == (order, 1)
    assert is_hadamard(core)
    assert hashlib.sha256(core.numpy().tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 512])
def test_powers_of_two_are_in_natural_order(order: int) -> None:
    """Entry (i, j) of Sylvester's matrix is the parity of the bits that i and j share; that is what the kernels use."""
    parity = [[(-1) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    assert hadamard_matrix(order).tolist() == parity


@pytest.mark.parametrize(("n", "core"), [(24, 12), (576, 36), (1376, 172), (1664, 52)])
def test_matrix_is_core_times_sylvester(n: int, core: int) -> None:
    expected = torch.kron(hadamard_matrix(core), hadamard_matrix(n // core))
    assert torch.equal(hadamard_matrix(n), expected)
    assert is_hadamard(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700))
def test_any_order_has_a_matrix_or_a_block(n: int) -> None:
    block = largest_block(n)
    assert n % block == 0
    assert is_hadamard(hadamard_matrix(block))
    if block == n:
        core, power = hadamard_core(n)
        assert core * power == n
        assert power & (power - 1) == 0
    else:
        with pytest.raises(NoHadamard, match=f"{n} .* {block}"):
            hadamard_core(n)


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (3, 1), (6, 2), (45, 1), (13696, 128), (27392, 256), (94, 2), (188, 4)]
)
def test_fallback_block(n: int, block: int) -> None:
    assert largest_block(n) == block


def test_every_multiple_of_four_below_188_has_a_matrix() -> None:
    assert [n for n in range(4, 200, 4) if largest_block(n) != n] == [188]


@pytest.mark.parametrize("n", [0, -4, 4.0, "4", True, None])
def test_orders_that_are_no_positive_integer(n: Any) -> None:
    for function in (hadamard_core, hadamard_matrix, largest_block, kronecker_factors):
        with pytest.raises(NoHadamard, match="positive integer"):
            function(n)


@pytest.mark.parametrize("block", [24, -4, 1024])
def test_blocks_that_do_not_divide(block: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        kronecker_factors(512, block)
    with pytest.raises(ValueError, match="does not divide"):
        hadamard_transform(torch.zeros(512), block)
    with pytest.raises(ValueError, match="no multiple of the Hadamard block 512"):
        kronecker_apply(torch.zeros(3, 100), kronecker_factors(512))


@pytest.mark.parametrize(("n", "block"), SHAPES)
def test_factors_multiply_to_the_matrix(n: int, block: int) -> None:
    factors = kronecker_factors(n, block, torch.float64)
    product = functools.reduce(torch.kron, factors)
    size = block or n
    torch.testing.assert_close(product, dense(size, size), rtol=1e-14, atol=0)


@pytest.mark.parametrize("n", [n for n in SIZES if (SIZES[n] > 1 or n > 1024) and SIZES[n] < 512])
def test_split_is_the_cheapest(n: int) -> None:
    left, right = (len(factor) for factor in kronecker_factors(n))
    assert left * right == n
    power = n // SIZES[n]
    assert left + right == min(n // b + b for b in (2**j for j in range(power.bit_length())))


@pytest.mark.parametrize(("n", "sizes"), [(3696, [44, 84]), (29568, [44, 84, 8])])
def test_a_large_core_is_applied_as_two_small_ones(n: int, sizes: list[int]) -> None:
    factors = kronecker_factors(n, dtype=torch.float64)
    assert [len(factor) for factor in factors] == sizes
    x = torch.randn(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    core = hadamard_matrix(3696).to(torch.float64)
    assert torch.equal(core, torch.kron(hadamard_matrix(44), hadamard_matrix(84)).to(torch.float64))
    sylvester = hadamard_matrix(n // 3696).to(torch.float64)
    expected = (core.T @ (x.view(3696, -1) @ sylvester) / math.sqrt(n)).view(1, n)
    torch.testing.assert_close(kronecker_apply(x, factors), expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.lists(st.integers(0, 3), max_size=3), st.booleans(), st.integers(0, 2**32))
def test_apply_agrees_with_the_dense_matrix(shape: tuple[int, int], lead: list[int], inverse: bool, seed: int) -> None:
    n, block = shape
    x = torch.randn(*lead, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation = dense(n, block)
    expected = x @ (rotation.T if inverse else rotation)
    y = kronecker_apply(x, kronecker_factors(n, block, torch.float64), inverse=inverse)
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x, block, inverse=inverse), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [n for n in SIZES if n > 8192])
def test_large_sizes_turn_and_turn_back(n: int) -> None:
    factors = kronecker_factors(n, dtype=torch.float64)
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    y = kronecker_apply(x, factors)
    torch.testing.assert_close(kronecker_apply(y, factors, inverse=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-13, atol=0)
    # One row in full: the last token is a unit vector, which picks row n - 2 of H_K (x) S.
    row = kronecker_apply(torch.eye(1, n, dtype=torch.float64).roll(n - 2), factors)[0]
    core, power = hadamard_core(n)
    parity = torch.tensor([(-1.0) ** ((power - 2) & j).bit_count() for j in range(power)], dtype=torch.float64)
    expected = torch.kron(hadamard_matrix(core)[-1].double(), parity) / math.sqrt(n)
    torch.testing.assert_close(row, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", SIZES)
def test_low_precision_factors_keep_the_norm(n: int, dtype: torch.dtype) -> None:
    """Whether the factors are made in that dtype or cast to it later; plain rounding is off by up to 4e-3."""
    made = kronecker_factors(n, dtype=dtype)
    cast = tuple(factor.to(dtype) for factor in kronecker_factors(n))
    for factors in (made, cast):
        magnitude = math.prod(factor[0, 0].abs().item() for factor in factors)
        assert magnitude * math.sqrt(n) == pytest.approx(1, abs=2e-4)


def test_apply_computes_in_the_dtype_of_x() -> None:
    x = torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = kronecker_apply(x, kronecker_factors(576))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), x.double() @ dense(576, 0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("n", "block"), [(24, 0), (96, 48), (512, 0)])
def test_gradient_is_the_transposed_transform(n: int, block: int) -> None:
    factors = kronecker_factors(n, block, torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, n, dtype=torch.float64, generator=generator, requires_grad=True)
    g = torch.randn(3, n, dtype=torch.float64, generator=generator)
    for inverse in (False, True):
        (gradient,) = torch.autograd.grad(kronecker_apply(x, factors, inverse=inverse), x, g)
        torch.testing.assert_close(gradient, kronecker_apply(g, factors, inverse=not inverse), rtol=0, atol=1e-13)


def test_apply_is_one_graph() -> None:
    factors = kronecker_factors(1536, 384)
    compiled = torch.compile(kronecker_apply, fullgraph=True, backend="eager")
    for tokens in (3, 5):
        x = torch.randn(tokens, 1536, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(compiled(x, factors), kronecker_apply(x, factors), rtol=0, atol=0)


@pytest.mark.parametrize(("n", "block"), [(64, 0), (96, 0), (1376, 0), (1344, 448)])
@pytest.mark.parametrize("inverse", [False, True])
def test_library_path_is_the_same_matrix(n: int, block: int, inverse: bool) -> None:
    """With the documented contract of fast_hadamard_transform (scale * x @ scipy's matrix) written out in torch."""

    def library(x: Tensor, scale: float) -> Tensor:
        return x @ hadamard_matrix(x.shape[-1]).to(x.dtype) * scale

    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = transform._library_apply(library, x, block or n, inverse=inverse)
    torch.testing.assert_close(y, hadamard_transform(x, block, inverse=inverse), rtol=0, atol=1e-12)


PACKAGE = """
import torch

def hadamard_transform(x, scale=1.0):
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(matrix) < x.shape[-1]:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=x.dtype, device=x.device), matrix)
    return x @ matrix * scale
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable fast_hadamard_transform, whose source the test writes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fast_hadamard_transform", raising=False)
    transform._library.cache_clear()
    yield tmp_path / "fast_hadamard_transform.py"
    sys.modules.pop("fast_hadamard_transform", None)
    transform._library.cache_clear()


def test_the_library_is_picked_where_it_can_be_imported(package: Path) -> None:
    package.write_text(PACKAGE)
    gpu = torch.device("cuda")
    assert [library_gap(n, torch.bfloat16, gpu) for n in (64, 128, 14336, 11008, 53248)] == [""] * 5
    assert library_gap(14336, torch.bfloat16, torch.device("cpu")) == "its kernel is for CUDA"
    assert library_gap(14336, torch.float64, gpu) == "its kernel does not take torch.float64"
    assert library_gap(29568, torch.bfloat16, gpu) == "a dense core of order 3696 is left of the order 29568"
    library = transform._library()
    assert library is not None
    x = torch.randn(3, 1376, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    y = transform._library_apply(library, x, 1376, inverse=False)
    torch.testing.assert_close(y, x @ dense(1376, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "faster"),
    [(64, True), (4096, True), (32768, True), (14336, False), (28672, False), (11008, False), (5120, False)],
)
def test_the_library_is_used_at_the_widths_where_it_is_faster(package: Path, width: int, faster: bool) -> None:
    package.write_text(PACKAGE)
    gpu = torch.device("cuda")
    assert library_gap(width, torch.bfloat16, gpu) == ""
    library = transform.faster_library(width, torch.bfloat16, gpu)
    assert (library is not None) == faster
    assert library in (None, transform._library())
    assert transform.faster_library(width, torch.bfloat16, torch.device("cpu")) is None
    assert transform.faster_library(width, torch.float64, gpu) is None


def test_the_library_is_not_used_where_it_is_not_there(package: Path) -> None:
    package.write_text("raise ImportError")
    assert transform.faster_library(4096, torch.bfloat16, torch.device("cuda")) is None


def test_a_library_that_does_not_load_is_left_out(package: Path) -> None:
    """Such as one that was built for another torch, whose import ends in an undefined symbol."""
    package.write_text("raise ImportError('undefined symbol')")
    assert "does not load" in library_gap(14336, torch.bfloat16, torch.device("cuda"))


def test_what_is_cached_serves_any_later_context() -> None:
    """First use in inference mode or under another default device must not spoil what is kept."""
    n = 4 * 12 * 11  # an order that no other test builds
    with torch.inference_mode(), torch.device("meta"):
        hadamard_transform(torch.zeros(n, device="cpu", dtype=torch.float64))
    x = torch.ones(n, dtype=torch.float64, requires_grad=True)
    hadamard_transform(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(n, 0).sum(1), rtol=0, atol=1e-12)


def test_matrices_handed_out_are_the_callers_own() -> None:
    before = hadamard_matrix(12)
    hadamard_matrix(12).zero_()
    assert torch.equal(hadamard_matrix(12), before)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "block"), [(14336, 0), (11008, 0), (1344, 448), (4096, 128)])
def test_cuda_agrees_with_the_cpu(n: int, block: int) -> None:
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = hadamard_transform(x, block)
    torch.testing.assert_close(hadamard_transform(x.cuda(), block).cpu(), expected, rtol=0, atol=1e-12)
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 5e-2)):  # TF32 may be on
        given = x.to("cuda", dtype)
        factors = kronecker_factors(n, block, dtype, "cuda")
        # The first two by fast_hadamard_transform where it is installed and faster.
        for y in (hadamard_transform(given, block), online_transform(given, factors), kronecker_apply(given, factors)):
            torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [1, 15, 64, 94, 172, 576])
def test_random_hadamard(n: int) -> None:
    rotation = random_hadamard(n, torch.Generator().manual_seed(5))
    assert rotation.dtype == torch.float64
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    ratio = rotation @ dense(n, largest_block(n)).T  # diag(signs)
    torch.testing.assert_close(ratio, torch.diag(ratio.diagonal().sign()), rtol=0, atol=1e-12)
    if n >= 64:
        assert abs(ratio.diagonal().sum().item()) < 5 * math.sqrt(n)  # both signs, in about equal number
    again = random_hadamard(n, torch.Generator().manual_seed(5), torch.float32)
    assert torch.equal(again, rotation.float())
    if n >= 64:
        assert not torch.equal(rotation, random_hadamard(n, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("n", [1, 7, 64, 200])
def test_random_orthogonal(n: int) -> None:
    rotation = random_orthogonal(n, torch.Generator().manual_seed(5))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    # The sign fix: in the factorisation of the same Gaussian the diagonal of R is positive.
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    r = rotation.T @ gaussian
    torch.testing.assert_close(r.tril(-1), torch.zeros_like(r), rtol=0, atol=1e-11)
    assert (r.diagonal() > 0).all()
    again = random_orthogonal(n, torch.Generator().manual_seed(5), torch.float32)
    assert torch.equal(again, rotation.float())


def test_random_draws_take_turns_on_one_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = random_hadamard(64, generator), random_hadamard(64, generator)
    assert not torch.equal(first, second)
    with pytest.raises(NoHadamard, match="positive integer"):
        random_orthogonal(0, generator)
