"""Work that goes on beside the main thread: the next items are made while one is used.

A layer's weights are read, checked and copied to the GPU, on a stream of their own, while the layer before it computes.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
Product = TypeVar("Product")


def prefetched(
    make: Callable[[Item], Product], items: Iterable[Item], device: torch.device, ahead: int = 1
) -> Generator[Product, None, None]:
    """`make(item)` for each of `items`, in order; one thread makes up to `ahead` of them while another is used.

    On CUDA `make` runs on a stream of its own, without gradients. The stream that is current where the product is taken waits
    for it, and a further item is begun only when the device is done with the one that its memory may have to come from: at
    most `ahead` + 1 products exist, as long as the caller holds one. Leaving the loop ends the thread after its present item.

    Args:
        make: calls no collective, since ranks do not agree on when it runs. Products are tensors, or mappings, sequences,
            dataclasses and modules of them. device: the one that they are made on; "cpu" needs no streams.

    Raises:
        Exception: whatever `make` raised, where its product would have come.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # for what `make` reads that was computed before
    source, waiting = iter(items), deque[Future[tuple[Product, torch.cuda.Event | None]]]()

    def work(item: Item, used: torch.cuda.Event | None) -> tuple[Product, torch.cuda.Event | None]:
        with torch.no_grad():  # both it and the current stream belong to a thread
            if stream is None:
                return make(item), None
            if used is not None:
                used.synchronize()
            with torch.cuda.device(device), torch.cuda.stream(stream):
                return make(item), stream.record_event()

    with ThreadPoolExecutor(1, "prefetch") as worker:
        try:
            for item in islice(source, ahead):
                waiting.append(worker.submit(work, item, None))
            while waiting:
                used = None if stream is None else torch.cuda.current_stream(device).record_event()
                product, made = waiting.popleft().result()
                for item in islice(source, 1):
                    waiting.append(worker.submit(work, item, used))
                if made is not None:
                    computing = torch.cuda.current_stream(device)
                    computing.wait_event(made)
                    for tensor in tensors_in(product):
                        if tensor.is_cuda:  # its memory goes back to the other stream, once this one is done with it
                            tensor.record_stream(computing)
                yield product
                del product  # not kept while the next one is waited for
        finally:
            for future in waiting:
                future.cancel()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of mappings, sequences, dataclasses and modules, nested or not."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in(list(vars(value).values()))
