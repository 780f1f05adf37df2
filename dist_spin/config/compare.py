"""Settings of a comparison."""

from dataclasses import dataclass, field
from typing import Literal

from dist_spin.config.bit_columns import parse_bits
from dist_spin.config.checks import MAX_SEED, check_range, check_text, check_unique, require

COMPARED = "rtn gptq smoothquant quarot spinquant_no_had spinquant_had ours"


@dataclass(frozen=True)
class CompareConfig:
    """compare (the table of systems, bits and seeds)."""

    methods: list[str] = field(default_factory=COMPARED.split)
    """Rows: rtn and gptq (no rotation), hadamard and orthogonal (random, unlearned), quarot, quarot_no_clips,
    spinquant_no_had (R1 and R2 alone), spinquant_had (published update rule), ours (this run's settings), and the other
    methods (smoothquant, flatquant, quik, ...; a name that is not one of them is answered with the list)."""
    bits: list[str] = field(default_factory=lambda: ["W4A16", "W4A8", "W4A4KV16", "W4A4KV4", "W4A8KV8"])
    """Columns: bits of weights, activations, and keys and values (16 if left out), int unless a number format follows, as in
    W4A4-nvfp4, W4A16-mxfp4 or W4A4-mxfp4-KV8-fp8; the settings of quant decide what is learned."""
    weights: list[Literal["rtn", "gptq"]] = field(default_factory=lambda: ["rtn", "gptq"])
    """How weights are rounded: every row once with each, but for rtn and gptq themselves."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the rows that start from something random; the table gives mean and standard deviation."""
    spread_seeds: int = 0
    """Also measure this many random Hadamards and random orthogonal matrices, to show how far they vary; 0: none."""
    spread_bits: list[str] = field(default_factory=lambda: ["W16A4KV4", "W4A4KV4"])
    """Bits of that study."""
    spread_weights: Literal["rtn", "gptq"] = "rtn"
    """How weights are rounded in that study."""
    keep_layers: bool = False
    """Keep the quantised layers of every row: a copy of the model each."""
    parallel: Literal["ranks", "rows"] = "ranks"
    """How several processes share the work: ranks: all compute one row at a time, the model sharded over them; rows: each
    computes whole rows on a GPU of its own, the next one that is free; such processes may be started at any time."""

    def __post_init__(self) -> None:
        require(bool(self.methods), "compare.methods", self.methods, "name at least one")
        require(bool(self.bits), "compare.bits", self.bits, "name at least one")
        require(bool(self.weights), "compare.weights", self.weights, "name at least one")
        require(bool(self.seeds), "compare.seeds", self.seeds, "name at least one")
        for method in self.methods:
            check_text("compare.methods", method)
        check_unique("compare.methods", self.methods, "name each once")
        check_unique("compare.bits", self.bits, "name each once")
        check_unique("compare.weights", self.weights, "name each once")
        check_unique("compare.seeds", self.seeds, "name each once")
        check_unique("compare.spread_bits", self.spread_bits, "name each once")
        widths = "write each as W4A4KV4 or W4A8, 2 to 8 or 16 bits, or with formats as W4A4-mxfp4-KV8-fp8"
        require(all(map(parse_bits, self.bits)), "compare.bits", self.bits, widths)
        require(all(map(parse_bits, self.spread_bits)), "compare.spread_bits", self.spread_bits, widths)
        for seed in self.seeds:
            check_range("compare.seeds", seed, 0, MAX_SEED, "use 0 or more")
        check_range("compare.spread_seeds", self.spread_seeds, 0, 100_000, "use a number of seeds, or 0 for none")
