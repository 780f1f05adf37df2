"""What it costs to learn for a serving engine's kernels instead of for accuracy alone: recipes beside each other.

    python benchmarks/serving_recipes.py OUT --learn tokens:L.npy#all --texts tokens:A.npy#all tokens:B.npy#all --seeds 0 1 2

Takes the arguments of accuracy.py and prints its table. The research rows learn clips beside asymmetric activations, with R3
and R4 online; the others are what vLLM computes (configs/serve): symmetric, no clips, cache in 16 bits, nothing online but R4
in blocks where a row says so. Rows of 4-bit activations learn scales with the rotations, by Adam, from fitted starts, the
others rotations alone. Groups are of 64 channels or fewer, since 128 does not divide the sizes of SmolLM2.
"""

import sys

from accuracy import ADAM, CLIPS, LONG, RANGE, SCALES, main

from dist_spin.cli import report_mistakes
from dist_spin.runtime.console import Console, shown_on

ROUNDED = ["quantize.cd_passes=4", "quantize.clip_norm=2"]
LEARNED = [*ADAM, *SCALES, *LONG, RANGE, *ROUNDED]
KV16 = ["quant.k_bits=16", "quant.v_bits=16"]
GROUPS = ["quant.w_group_size=64"]
KERNEL = [*KV16, *GROUPS, "quant.a_symmetric=true", "quant.arithmetic=vllm", "rotation.online=false"]
KERNEL += ["export.target=compressed-tensors"]
SERVED = [*LEARNED, *KERNEL]
R4 = ["rotation.online=true", "export.profile=r4-block"]
GROUPS_AND_R4 = [*SERVED, *R4, "rotation.r4_block=64", "quant.a_group_size=64"]
WIDE = [
    *ROUNDED,
    *KERNEL,
    "optimize.a_bits=4",
]  # what is learned at 8 bits teaches little, and 100 published steps are enough

# The most telling rows first, since time may end.
RUNS = {
    "research": [*LEARNED, *CLIPS],
    "W4A4": SERVED,
    "W4A4, activations in groups": [*SERVED, "quant.a_group_size=64"],
    "W4A4, R4 in blocks of 64": [*SERVED, *R4, "rotation.r4_block=64"],
    "W4A4, R4 in blocks of 128": [*SERVED, *R4, "rotation.r4_block=128"],
    "W4A4, activations in groups, R4 in blocks of 64": GROUPS_AND_R4,
    "W4A8": [*WIDE, "quant.a_bits=8"],
    "W8A8": [*WIDE, "quant.a_bits=8", "quant.w_bits=8", "quant.w_group_size=0"],
    "W4A16": [*WIDE, "quant.a_bits=16"],
    "research, KV16, weights in groups": [*LEARNED, *CLIPS, *KV16, *GROUPS],
    "research, KV16": [*LEARNED, *CLIPS, *KV16],
    "W4A4, weights in rows": [*SERVED, "quant.w_group_size=0"],
    "W4A4, activations in groups of 32": [*SERVED, "quant.a_group_size=32"],
    "W4A4, activations in groups, R4 in blocks of 64, half KL": [*GROUPS_AND_R4, "optimize.objective=mixed"],
    "W4A4, activations in groups, R4 in blocks of 64, 1000 steps": [*GROUPS_AND_R4, "optimize.steps=1000"],
}

if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(lambda: main(RUNS)))
