"""What a benchmark says of the device it ran on."""

import platform
import time

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """Device and versions, for a report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}"


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product on random data, the mean of repeated products after a warm-up."""
    n, repeats = (8192, 20) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    began = time.monotonic()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return 2 * n**3 * repeats / (time.monotonic() - began)
