"""What a benchmark says of the device it ran on."""

import platform
import time
from collections.abc import Callable

import torch

from dist_spin.runtime.cpu_features import bf16_is_fast

CEILING_SECONDS, CEILING_WARM_UP = 2.0, 3  # how long `matmul_ceiling` may take; products before those that count


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """Device and versions, for a report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}"


def matmul_ceiling(device: torch.device) -> tuple[float, torch.dtype]:
    """FLOP/s of a large matrix product on random data, the mean of repeated products after a warm-up, and its dtype.

    bfloat16 on a GPU and on a CPU that computes it fast, float32 on any other CPU. The matrices grow until the next size
    would take more than `CEILING_SECONDS`, so that the time is bounded on any machine.
    """
    dtype = torch.bfloat16 if device.type == "cuda" or bf16_is_fast() else torch.float32
    largest, repeats = (8192, 20) if device.type == "cuda" else (1024, 3)
    n = 256
    seconds = _product_seconds(n, 1, device, dtype)
    while n < largest and 8 * seconds * (CEILING_WARM_UP + repeats) < CEILING_SECONDS:
        n *= 2
        seconds = _product_seconds(n, 1, device, dtype)
    return 2 * n**3 / _product_seconds(n, repeats, device, dtype), dtype


def _product_seconds(n: int, repeats: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one product of two random [n, n], the mean of `repeats` of them."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(CEILING_WARM_UP if repeats > 1 else 1):
        a @ b
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def clock(call: Callable[[], object], device: torch.device, at_least: float = 0.2) -> float:
    """Seconds of one call, the mean of repeats that fill `at_least` seconds (two or more, or one if a call takes longer).

    On CUDA a call that is shorter than that is captured once as a graph and replayed: launching its kernels one by one from
    Python would hide short ones. Before anything counts it is called until everything is compiled and allocated.
    """
    if device.type != "cuda":
        for _ in range(2):
            call()
        return _repeated(call, at_least, lambda: None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = time.perf_counter() - began
        if once <= at_least:
            call()
    torch.cuda.current_stream().wait_stream(side)
    if once > at_least:
        return once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return _repeated(graph.replay, at_least, torch.cuda.synchronize)


def _repeated(call: Callable[[], object], at_least: float, wait: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    wait()
    once = time.perf_counter() - began
    if once > at_least:
        return once
    repeats = min(max(2, int(at_least / once)), 1000)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats
