"""Settings of learning the rotations."""

from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import (
    BITS,
    FP32_MAX,
    MAX_BATCH,
    MAX_COUNT,
    MAX_SEED,
    MAX_SEQ_LEN,
    MAX_TOKENS,
    SELF,
    check_positive,
    check_range,
    check_source,
    check_text,
    require,
)

MAX_TOP_K = 1 << 16  # where a vocabulary's logits themselves would take less


@dataclass(frozen=True)
class OptimizeConfig:
    """optimize (learning the rotations; published: in the paper on SpinQuant)."""

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
    teacher_top_k: int = 0
    """For kl and mixed: most probable tokens of full precision that are stored for every position before the first step, so
    that steps run it no more; the others count as one. 256 take 1.5 KB a token of text on disk. 0: it runs in every step."""
    scales: bool = False
    """Also learn per-channel scales, which merge into norms and weights: before linears, up to down, v to o, k to q."""
    scale_lr: float = 0.03
    """Learning rate of log-scales (Adam); the schedule and warm-up are those of `lr`."""
    clips: bool = False
    """Also learn the fraction of the range that each quantiser keeps, per layer."""
    clip_lr: float = 0.05
    """Learning rate of the clips' logits (Adam)."""
    guard_every: int = 0
    """Steps between measurements on held-out sequences; the best state so far is kept and returned to after a
    loss spike, at half the learning rate; 0 switches this off."""
    guard_sequences: int = 8
    """Sequences at the end of the learning text that are held out for these measurements."""
    seed: int = 0
    """Seed of the order of the sequences; -1 takes them as they come, as published."""
    recompute: Literal["auto", "none", "sites", "layer"] = "auto"
    """What is computed again in the backward pass to save memory: nothing, all but the quantised sites, or whole layers;
    auto keeps as much as measured free GPU memory allows, and on the CPU keeps the sites."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto means on for CUDA and off for CPU, where compiling takes longer than it saves."""

    def __post_init__(self) -> None:
        check_source("optimize.source", self.source)
        check_text("optimize.split", self.split)
        check_range("optimize.seq_len", self.seq_len, 2, MAX_SEQ_LEN, "next-token loss needs 2 tokens or more")
        check_range("optimize.steps", self.steps, 0, MAX_COUNT, "use a number of steps, or 0 to learn nothing")
        most = min(MAX_BATCH, MAX_TOKENS // self.seq_len)
        check_range("optimize.batch_size", self.batch_size, 1, most, "use 1 or more")
        if self.source == SELF:  # all of it is written and held before the first step
            written = MAX_TOKENS // (self.batch_size * self.seq_len)
            own = f"the model writes text for at most {written} steps"
            require(self.steps <= written, "optimize.steps", self.steps, own)
        size = f"optimize.batch_size is {self.batch_size}, so use at most that"
        require(0 <= self.micro_batch_size <= self.batch_size, "optimize.micro_batch_size", self.micro_batch_size, size)
        check_positive("optimize.lr", self.lr, "use a number above 0")
        last = max(0, self.steps - 1)
        left = f"optimize.steps is {self.steps}, so use {f'0 to {last}' if last else '0'}"
        require(0 <= self.warmup_steps <= last, "optimize.warmup_steps", self.warmup_steps, left)
        require(0 <= self.momentum < 1, "optimize.momentum", self.momentum, "use 0 up to but not including 1")
        require(self.w_bits in BITS, "optimize.w_bits", self.w_bits, "use 2 to 8 bits, or 16 = off")
        activations = "use 2 to 8 bits, or 0 for those of quant"
        require(self.a_bits in (0, *BITS[:-1]), "optimize.a_bits", self.a_bits, activations)
        if self.w_bits < 16:
            alone = f"optimize.w_bits={self.w_bits} learns rotations alone, so use"
            require(not self.scales, "optimize.scales", self.scales, f"{alone} false")
            require(not self.clips, "optimize.clips", self.clips, f"{alone} false")
            require(self.objective == "cross_entropy", "optimize.objective", self.objective, f"{alone} cross_entropy")
        limit = "use a number above 0, or 0 for no limit"
        check_range("optimize.max_grad_norm", self.max_grad_norm, 0, FP32_MAX, limit)
        check_range("optimize.reproject_every", self.reproject_every, 1, MAX_COUNT, "use 1 or more")
        check_range("optimize.keep_checkpoints", self.keep_checkpoints, 1, MAX_COUNT, "use 1 or more")
        check_range("optimize.teacher_top_k", self.teacher_top_k, 0, MAX_TOP_K, "use a number such as 256, or 0")
        if self.teacher_top_k:
            unused = "cross entropy has no teacher: set it to 0, or use optimize.objective=kl or mixed"
            distils = self.objective != "cross_entropy"
            require(distils, "optimize.teacher_top_k", self.teacher_top_k, unused)
        require(0 < self.kl_share < 1, "optimize.kl_share", self.kl_share, "use a share above 0 and below 1")
        check_range("optimize.scale_lr", self.scale_lr, 0, FP32_MAX, "use 0 or more")
        check_range("optimize.clip_lr", self.clip_lr, 0, FP32_MAX, "use 0 or more")
        check_range("optimize.guard_every", self.guard_every, 0, MAX_COUNT, "use a number of steps, or 0 for no guard")
        check_range("optimize.guard_sequences", self.guard_sequences, 1, MAX_BATCH, "use 1 or more")
        check_range("optimize.seed", self.seed, -1, MAX_SEED, "use 0 or more, or -1 for the order as it comes")
