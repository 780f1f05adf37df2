"""Formats follow what the processor computes fast, and the ceiling of `bench optimize` takes seconds on any processor."""

import os
import platform
import subprocess
import sys
import time

import pytest
import torch

from dist_spin.bench.device import CEILING_SECONDS, matmul_ceiling
from dist_spin.runtime.cpu_features import bf16_is_fast

# What a processor with AVX2 and no more computes with.
CAPPED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the cap is for x86")
def test_without_bf16_instructions_the_ceiling_is_of_fp32_products():
    code = (
        "import torch; from dist_spin.bench.device import matmul_ceiling;"
        "from dist_spin.runtime.cpu_features import bf16_is_fast;"
        "print(bf16_is_fast(), matmul_ceiling(torch.device('cpu'))[1])"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **CAPPED}, capture_output=True, text=True, check=True
    )
    assert child.stdout.split() == ["False", "torch.float32"]


def test_the_ceiling_is_of_the_fast_format_and_takes_seconds():
    fast = bf16_is_fast()
    began = time.monotonic()
    rate, dtype = matmul_ceiling(torch.device("cpu"))
    assert time.monotonic() - began < 4 * CEILING_SECONDS
    assert dtype == (torch.bfloat16 if fast else torch.float32)
    assert rate > 0
