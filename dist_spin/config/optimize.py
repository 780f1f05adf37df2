"""Settings of learning the rotations."""

import math
from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import BITS, _check, check_source


@dataclass(frozen=True)
class OptimizeConfig:
    """optimize (learning the rotations)."""

    source: str = "wikitext2"
    """Text to learn from: pydoc, wikitext2, c4, hf:NAME[:CONFIG][:COLUMN], text:PATH[,PATH…], tokens:PATH.npy, or self,
    which the model writes itself."""
    split: str = "train"
    """Part of the source; local ones have train (first 80 %), test (the rest) and all (also text:PATH#all)."""
    seq_len: int = 2048
    """Length of one sequence, tokens; the published length."""
    steps: int = 100
    """Gradient steps; 100 as published. 0 learns nothing and takes rotation.load (or init) as it is."""
    batch_size: int = 8
    """Sequences per step over all processes together, so that the result does not depend on how many there are."""
    micro_batch_size: int = 0
    """Sequences per forward pass in one process; 0: as many as pay and fit into measured GPU memory, 1 on the CPU."""
    lr: float = 1.5
    """Learning rate, an upper bound: a step is shortened when the gradient is large. The published value."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate over the steps after the warm-up; cosine and linear end at 0."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0; 0 as published, a few calm an unstable start."""
    momentum: float = 0.0
    """Momentum, from 0 up to but not including 1; 0 as published."""
    w_bits: int = 16
    """Weight bits while learning (2 to 8, or 16 = off): 16 if GPTQ follows, 4 if rtn does (published). quant.w_… apply."""
    a_bits: int = 0
    """Bits of activations, keys and values while learning (2 to 8); 0: those of quant. Where quant leaves all at 16 bits,
    learn at 4: nothing is rounded otherwise, so there is nothing to learn from."""
    max_grad_norm: float = 1.0
    """Joint gradient norm above which gradients are scaled down; 0 switches this off."""
    optimizer: Literal["cayley_sgd", "cayley_adam"] = "cayley_sgd"
    """Update rule on the orthogonal matrices; cayley_sgd is the published one."""
    reproject_every: int = 20
    """Steps between re-orthogonalisations, which remove rounding drift; rare enough to cost little."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept (one is written per step)."""
    objective: Literal["cross_entropy", "kl", "mixed"] = "cross_entropy"
    """Loss: next tokens of the text (as published), divergence from the full-precision model's predictions, or both."""
    kl_share: float = 0.5
    """Share of the divergence in a mixed objective; the rest is cross entropy."""
    scales: bool = False
    """Also learn per-channel scales, which merge into norms and weights: before linears, up to down, v to o, k to q."""
    scale_lr: float = 0.03
    """Learning rate of log-scales (Adam); the schedule and warm-up are those of `lr`."""
    clips: bool = False
    """Also learn the fraction of the range that each quantiser keeps, per layer."""
    clip_lr: float = 0.05
    """Learning rate of the clips' logits (Adam)."""
    guard_every: int = 0
    """Steps between measurements on held-out sequences; the best state so far is kept and returned to when learning
    jumps, at half the learning rate; 0 switches the guard off."""
    guard_sequences: int = 8
    """Sequences at the end of the learning text that the guard holds out."""
    seed: int = 0
    """Seed of the order of the sequences; -1 takes them as they come, as published."""
    recompute: Literal["auto", "none", "sites", "layer"] = "auto"
    """What is computed again in the backward pass to save memory: nothing, all but the quantised sites, or whole layers;
    auto keeps as much as measured free GPU memory allows, and on the CPU keeps the sites."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto means on for CUDA and off for CPU, where compiling takes longer than it saves."""

    def __post_init__(self) -> None:
        check_source("optimize.source", self.source)
        _check(self, "seq_len", lambda n: n >= 2, "next-token loss needs 2 tokens or more")
        counts = "batch_size reproject_every keep_checkpoints"
        _check(self, counts, lambda n: n >= 1, "use 1 or more")
        _check(self, "w_bits", lambda n: n in BITS, "use 2 to 8 bits, or 16 = off")
        _check(self, "a_bits", lambda n: n in (0, *BITS[:-1]), "use 2 to 8 bits, or 0 for those of quant")
        if self.w_bits < 16:
            alone = f"optimize.w_bits={self.w_bits} learns rotations alone, so use"
            _check(self, "scales clips", lambda on: not on, f"{alone} false")
            _check(self, "objective", lambda name: name == "cross_entropy", f"{alone} cross_entropy")
        _check(self, "steps", lambda n: n >= 0, "use a number of steps, or 0 to learn nothing")
        _check(self, "seed", lambda n: n >= -1, "use 0 or more, or -1 for the order as it comes")
        most = f"optimize.batch_size is {self.batch_size}, so use at most that"
        _check(self, "micro_batch_size", lambda n: 0 <= n <= self.batch_size, most)
        left = f"optimize.steps is {self.steps}, so use 0 to {max(0, self.steps - 1)}"
        _check(self, "warmup_steps", lambda n: 0 <= n < max(1, self.steps), left)
        _check(self, "lr", lambda x: 0 < x < math.inf, "use a number above 0")
        _check(self, "scale_lr clip_lr", lambda x: 0 <= x < math.inf, "use 0 or more")
        _check(self, "kl_share", lambda x: 0 < x < 1, "use a share above 0 and below 1")
        _check(self, "guard_every", lambda n: n >= 0, "use a number of steps, or 0 for no guard")
        _check(self, "guard_sequences", lambda n: n >= 1, "use 1 or more")
        _check(self, "momentum", lambda x: 0 <= x < 1, "use 0 up to but not including 1")
        _check(self, "max_grad_norm", lambda x: 0 <= x < math.inf, "use a number above 0, or 0 for no limit")
