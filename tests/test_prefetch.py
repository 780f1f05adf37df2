"""The next items are made by a thread while one is used: in order, bounded, and no further than somebody wants them."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.runtime.prefetch import prefetched, tensors_in

CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@given(count=st.integers(0, 9), ahead=st.integers(1, 4), taken=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_items_come_in_order_and_no_more_than_asked_for_are_in_flight(count: int, ahead: int, taken: int) -> None:
    made: list[int] = []
    used = 0

    def make(i: int) -> int:
        assert len(made) <= used + ahead  # those that were used up, `ahead` more, and the one that is being used
        made.append(i)
        return i * i

    products = prefetched(make, range(count), CPU, ahead)
    out = []
    for product in products:
        out.append(product)
        if len(out) > taken:
            break
        used += 1
    products.close()  # type: ignore[attr-defined]
    assert out == [i * i for i in range(min(count, taken + 1))]
    assert made == list(range(len(made)))
    assert not threads()


def test_the_next_item_is_made_while_one_is_used() -> None:
    begun = threading.Event()

    def make(i: int) -> int:
        if i == 1:
            begun.set()
        return i

    for product in prefetched(make, range(2), CPU):
        if product == 0:
            assert begun.wait(10)


def test_an_error_comes_where_its_product_would_have_come_and_ends_the_thread() -> None:
    made: list[int] = []

    def make(i: int) -> int:
        made.append(i)
        if i == 2:
            raise OSError("the disk is gone")
        return i

    products, out = prefetched(make, range(9), CPU), list[int]()
    with pytest.raises(OSError, match="the disk is gone"):
        out.extend(products)
    assert (out, made) == ([0, 1], [0, 1, 2])
    assert not threads()


def test_an_error_of_the_consumer_ends_the_thread_after_its_present_item() -> None:
    made: list[int] = []

    def make(i: int) -> int:
        time.sleep(0.01)
        made.append(i)
        return i

    def consume() -> None:
        for product in prefetched(make, range(1000), CPU):
            raise KeyError(product)

    with pytest.raises(KeyError):
        consume()
    assert len(made) <= 2
    assert not threads()


def test_items_that_cannot_be_listed_raise_in_the_consumer() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(prefetched(lambda i: i, items(), CPU))
    assert not threads()


def test_no_gradients_are_recorded_in_the_thread() -> None:
    weight = torch.ones(2, requires_grad=True)
    (product,) = prefetched(lambda i: weight * i, [3], CPU)
    assert not product.requires_grad


def test_tensors_are_found_in_whatever_holds_them() -> None:
    layer = nn.BatchNorm1d(2)
    value = {
        "a": [torch.zeros(1)],
        "b": QuantizedWeight(*torch.zeros(3, 1)),
        "c": layer,
        "d": Sites(r4=(torch.ones(2, 2),)),
    }
    assert len(list(tensors_in(value))) == 1 + 3 + len(layer.state_dict()) + 1


@pytest.mark.gpu
def test_memory_on_the_gpu_stays_bounded_and_what_is_read_is_what_was_made() -> None:
    device, size = torch.device("cuda"), 1 << 24

    def make(i: int) -> torch.Tensor:
        return torch.full((size,), float(i)).pin_memory().to(device, non_blocking=True)

    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sums = []
    for product in prefetched(make, range(12), device):
        for _ in range(10):  # the device falls behind
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        sums.append(product.sum(dtype=torch.float64))
        del product
    assert [float(s) for s in sums] == [float(i * size) for i in range(12)]
    assert torch.cuda.max_memory_allocated() - before < 4 * (4 * size) + 4 * matrix.nbytes
