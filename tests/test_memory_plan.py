"""What is kept and how many sequences pass at once, for given memory: decisions that only a large GPU meets otherwise."""

import os
import shutil
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from dist_spin.model.activation_checkpoint import LEVELS, kept_bytes, plan
from dist_spin.model.architecture import Shape
from dist_spin.optimize.sharding.memory_planner import MOST_TOKENS, Workload, fewest_or_fastest, within
from dist_spin.runtime.host_memory import host_bytes_free

SHAPES = Path(__file__).parents[1] / "configs" / "shapes"
GIB = 2**30
T = 2048


def shape_of(name: str) -> Shape:
    return Shape.of(AutoConfig.from_pretrained(SHAPES / name))


L70, L8 = shape_of("llama-3-70b"), shape_of("llama-3-8b")


def chosen(shape: Shape, budget: int, mine: int, **more) -> tuple[int, list[str]]:
    return within(Workload(shape, mine, T, torch.bfloat16, **more), budget)


def test_where_all_fits_a_pass_is_as_large_as_pays():
    assert chosen(L8, 60 * GIB, 8) == (4, ["none"] * 32)
    assert chosen(L70, 90 * GIB, 2) == (2, ["none"] * 80)


def test_smaller_passes_that_repeat_less_are_preferred():
    """70B on two GPUs of 141 GB: two passes of two sequences took 6.02 s, one of four 6.22 s."""
    size, levels = chosen(L70, 55 * GIB, 4)
    assert size == 2
    assert 30 < levels.count("none") < 60
    assert set(levels) == {"none", "sites"}


def test_rotations_in_blocks_reserve_their_blocks_alone():
    whole, blocks = (Workload(L70, 8, T, torch.bfloat16, block=block).rotations for block in (0, 32))
    assert whole == 48 * (8192**2 + 80 * 128**2)
    assert blocks == 48 * 32 * (8192 + 80 * 128)


def test_layers_from_the_host_are_fetched_seldom():
    work = Workload(L70, 8, T, torch.bfloat16)
    assert within(work, 60 * GIB, offloaded=70)[0] > within(work, 60 * GIB)[0]


def test_70b_on_one_gpu_of_141_gb():
    """What the host takes leaves room to compute less twice; without it, as few layers move as can."""
    work, free, total = Workload(L70, 8, T, torch.bfloat16), int(139.1 * GIB), int(139.8 * GIB)
    fewest, fastest = (fewest_or_fastest(work, free, total, room) for room in (0, 50))
    assert 10 < fewest < fastest <= 50
    assert fewest_or_fastest(Workload(L8, 8, T, torch.bfloat16), free, total, 32) == 0
    assert fewest_or_fastest(Workload(L70, 4, T, torch.bfloat16, shards=2), free, total, 80) == 0
    assert fewest_or_fastest(Workload(L8, 8, T, torch.bfloat16, micro=8), free, total, 32) == 0  # as the user wants it
    assert fewest_or_fastest(Workload(L8, 1, 5 * T, torch.bfloat16), free, total, 32) == 0  # one sequence is the least
    assert fewest_or_fastest(work, 40 * GIB, 40 * GIB, 0) > 60
    # Two of 80 GB: a few more than must go, since passes are then of two sequences.
    small = Workload(L70, 4, T, torch.bfloat16, shards=2), 79 * GIB, 80 * GIB
    assert 0 < fewest_or_fastest(*small, 0) < fewest_or_fastest(*small, 80) < 30


def test_learning_with_rounded_weights_keeps_more():
    per = [
        kept_bytes(L70, T, 2, "none", compiled=True, fake_quant_linears=fake_quant_linears)
        for fake_quant_linears in (False, True)
    ]
    assert per[1] - per[0] == T * 2 * (8192 + 28672)  # inputs of o_proj and down_proj
    levels = [chosen(L70, 60 * GIB, 2, micro=2, w_bits=bits)[1] for bits in (16, 4)]
    assert levels[0].count("none") > levels[1].count("none")


def test_learning_scales_and_clips_keeps_more():
    """8B on one H200, 4 sequences a pass: 1.9 GiB a layer were kept, and nothing needed to be computed again."""
    assert 1.9 * GIB < kept_bytes(L8, 4 * T, 2, "none", transformed=True) < 2.5 * GIB
    assert chosen(L8, 100 * GIB, 8, transformed=True) == (4, ["none"] * 32)
    assert chosen(L8, 50 * GIB, 8, transformed=True)[0] < 4


@given(st.integers(1, 130), st.integers(1, 16), st.sampled_from([4, 16]), st.sampled_from([L8, L70]))
def test_what_is_chosen_fits_or_is_the_least_there_is(gib, mine, w_bits, shape):
    size, levels = chosen(shape, gib * GIB, mine, w_bits=w_bits)
    assert 1 <= size <= min(mine, MOST_TOKENS // T)
    assert levels == plan(shape, size * T, 2, gib * GIB, compiled=True, fake_quant_linears=w_bits < 16)
    need = {
        level: kept_bytes(shape, size * T, 2, level, compiled=True, fake_quant_linears=w_bits < 16) for level in LEVELS
    }
    taken = sum(need[level] for level in levels) + 2 * need["none"]
    assert taken <= gib * GIB or (size == 1 and levels == ["layer"] * shape.layers)


def test_what_the_user_says_is_done():
    assert chosen(L8, GIB, 8, micro=3, recompute="none") == (3, ["none"] * 32)


def test_limits_of_control_groups_bound_what_the_host_has(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"

    def free(said: str, **files: str) -> int:
        shutil.rmtree(tmp_path, ignore_errors=True)
        for path, text in {
            "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
            "proc/self/cgroup": said,
            **files,
        }.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return host_bytes_free(proc, groups)

    def v2(path: str, most: str, used: int) -> dict[str, str]:
        place = f"cgroup/{path}/memory"
        return {f"{place}.max": most, f"{place}.current": str(used), f"{place}.stat": "anon 7\ninactive_file 100\n"}

    all_there_is = 8000 * 1024
    assert free("0::/job/step\n") == all_there_is
    assert free("0::/job/step\n", **v2("job/step", "max\n", 50_000)) == all_there_is
    assert free("0::/job/step\n", **v2("job/step", "max\n", 50_000), **v2("job", "70000\n", 50_000)) == 20_100
    assert free("0::/job\n", **v2("job", "70000\n", 80_000)) == 0
    v1 = {
        "cgroup/memory/job/memory.limit_in_bytes": "3000\n",
        "cgroup/memory/job/memory.usage_in_bytes": "1000\n",
        "cgroup/memory/job/memory.stat": "total_inactive_file 10\n",
    }
    assert free("5:cpu:/job\n4:memory:/job\n0::/\n", **v1) == 2010
    assert free("5:cpu:/job\n", **v1) == all_there_is
    assert 0 < host_bytes_free() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
