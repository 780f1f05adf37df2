"""What this processor computes fast and exactly, asked by a short measurement: flags do not say what a library makes of them."""

import time
from functools import cache

import torch

INT8_SATURATES = "8-bit products saturate on this CPU, which has no VNNI instructions"  # where `int8_is_exact` says no
SIZE, ROUNDS = 256, 5  # 33 MFLOP a product: 0.04 s on a core without bf16 instructions, far less on any other


@cache
def bf16_is_fast() -> bool:
    """Whether matrix products in bfloat16 take no longer on this CPU than in float32; measured once per process.

    A CPU without bf16 instructions converts every element and is 10 to 50 times slower. The two formats take turns and the
    best time of each counts, so that other work on the machine does not decide. Takes well under a second. Processes on
    different machines may get different answers: where ranks must agree, one of them asks.
    """
    operands = {dtype: torch.ones(SIZE, SIZE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    for _ in range(ROUNDS + 1):
        for dtype, x in operands.items():
            began = time.perf_counter()
            x @ x
            seconds[dtype].append(time.perf_counter() - began)
    fp32, bf16 = (min(times[1:]) for times in seconds.values())  # the first product of each sets the library up
    return bf16 <= fp32


@cache
def int8_is_exact() -> bool:
    """Whether products of 8-bit integer matrices are exact on this CPU, as oneDNN computes them for torch and for vLLM.

    Without VNNI instructions two products are added in 16 bits, which saturates where both are large.
    """
    most = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most.T) == 64 * 127**2).all())
