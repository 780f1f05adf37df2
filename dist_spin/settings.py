"""The run's settings: one dataclass per component, checked as soon as they are built.

`dist-spin VERB --help` prints the docstrings below; `dist_spin.config` reads them from files and the command line.
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dist_spin.errors import UserError

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
CLIPS = {"quarot": {"a_clip_ratio": 0.9, "k_clip_ratio": 0.95, "v_clip_ratio": 0.95}}  # presets of QuantConfig
COMPARED = "rtn gptq smoothquant quarot spinquant_no_had spinquant_had ours"
NAMED_SOURCES = ("pydoc", "wikitext2", "c4")
SELF = "self"  # text that the model writes, to learn or calibrate from
TASKS = (
    "boolq",
    "piqa",
    "siqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "lambada_openai",
)


def _check(config: object, names: str, wanted: Callable[[Any], bool], remedy: str) -> None:
    """Raise UserError unless every named field is `wanted`, said as what is right so that NaN never passes."""
    group = type(config).__name__.removesuffix("Config").lower()
    for name in names.split():
        value = getattr(config, name)
        if not wanted(value):
            key = name if group == "run" else f"{group}.{name}"
            raise UserError(f"{key} is {value!r}", remedy)


def check_source(key: str, source: str) -> None:
    """Check the form of a text source; whether it can be read is known only when `dist_spin.data` reads it.

    Raises:
        UserError: `source` is neither a known name nor `hf:…`, `text:…` or `tokens:….npy`.
    """
    kind, _, rest = source.partition(":")
    if source in (*NAMED_SOURCES, SELF) or (kind in ("hf", "text") and rest):
        return
    if kind == "tokens" and rest.removesuffix("#all").endswith(".npy"):
        return
    close = difflib.get_close_matches(source, NAMED_SOURCES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    choices = f"{', '.join(NAMED_SOURCES)}, self, hf:NAME, text:PATH or tokens:PATH.npy"
    raise UserError(f"{key} is {source!r}, which is no text source", f"{hint}use {choices}")


@dataclass(frozen=True)
class ModelConfig:
    """model (the network whose rotations are learned)."""

    path: str
    """Hugging Face directory or hub id, .gguf file, or package:NAME (the one .gguf in an installed Python package)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the newest, so pin it to make a run repeatable."""
    dtype: Literal["bfloat16", "float32", "float64", "float16"] = "bfloat16"
    """Number format of weights and compute; bfloat16 is what these models were trained in."""
    dummy_weights: bool = False
    """Seeded random weights, only config.json is read: for timing and memory tests without a download."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; off because that code can do anything."""

    def __post_init__(self) -> None:
        _check(self, "path", bool, "give a model directory, hub id, .gguf file or package:NAME")


@dataclass(frozen=True)
class RotationConfig:
    """rotation (where the rotations start, and which are used)."""

    init: Literal["hadamard", "range", "orthogonal", "identity"] = "hadamard"
    """Start of R1 and R2: randomised Hadamard; range: the same, but R1 fitted to activations of the learning text, in a
    minute or so, so that each token's range is small; random orthogonal; or none."""
    seed: int = 0
    """Seed of the random start."""
    online: bool = True
    """Add R3 (queries, keys) and R4 (down_proj input) at run time, which 4 bits need; false: R1 and R2, at no cost."""
    r4_block: int = 0
    """Block size of R4 in channels; 0 rotates the whole intermediate size."""
    load: str | None = None
    """File of rotations to start from instead of `init`: R.bin or .safetensors (scales and clips too, where learned)."""

    def __post_init__(self) -> None:
        _check(self, "seed", lambda n: n >= 0, "use 0 or more")
        _check(self, "r4_block", lambda n: n >= 0, "use 0 for the whole size, or a block size in channels")


@dataclass(frozen=True)
class QuantConfig:
    """quant (bits of weights W, inputs of linear layers A, attention keys K and values V)."""

    w_bits: int = 4
    """Weight bits (2 to 8, or 16 = off). 4 is the published setting."""
    w_symmetric: bool = True
    """Weights symmetric around 0, which kernels want; false adds a zero point."""
    w_group_size: int = 0
    """Input channels that share one weight scale; 0 means one scale per output channel, as published."""
    w_mse_clip: bool = True
    """Search for the weight clipping of least error instead of taking the largest weight."""
    down_bits: int = 0
    """Weight bits of down_proj (2 to 8), such as 8 for the linear that suffers most from rounding; 0 takes w_bits."""
    embedding_bits: int = 16
    """Bits of the embedding (2 to 8, or 16 = off): rounded to nearest, symmetric, one scale per token of the vocabulary."""
    head_bits: int = 16
    """Bits of lm_head (2 to 8, or 16 = off), rounded as the embedding is; tied weights are rounded apart."""
    a_bits: int = 4
    """Bits of the inputs of linear layers (2 to 8, or 16 = off), quantised per token at run time."""
    a_symmetric: bool = False
    """Activations symmetric around 0; false adds a zero point, as published."""
    a_clip_ratio: float = 1.0
    """Fraction of the activation range that is kept, above 0 up to 1; 1 clips nothing."""
    clips: Literal["none", "quarot"] = "none"
    """Preset of the three clip ratios: quarot sets activations 0.9, keys and values 0.95; none leaves them as given."""
    arithmetic: Literal["auto", "fp32", "compressed-tensors"] = "auto"
    """How scales are computed: in fp32, largest symmetric activation = highest code; or as compressed-tensors' runtime does,
    in the model's number format and half a step beyond it; auto: as export.target needs."""
    o_per_head: bool = False
    """Quantise the input of o_proj per head instead of per token; the paper says per token."""
    k_bits: int = 4
    """Bits of the keys (2 to 8, or 16 = off), quantised after the position embedding and R3."""
    k_symmetric: bool = False
    """Keys symmetric around 0; false adds a zero point, as published."""
    k_clip_ratio: float = 1.0
    """Fraction of the key range that is kept, above 0 up to 1; 1 clips nothing."""
    k_group_size: int = 0
    """Channels that share one key scale; 0 means the head dimension (one scale per head and token)."""
    v_bits: int = 4
    """Bits of the values (2 to 8, or 16 = off)."""
    v_symmetric: bool = False
    """Values symmetric around 0; false adds a zero point, as published."""
    v_clip_ratio: float = 1.0
    """Fraction of the value range that is kept, above 0 up to 1; 1 clips nothing."""
    v_group_size: int = 0
    """Channels that share one value scale; 0 means the head dimension (one scale per head and token)."""

    def __post_init__(self) -> None:
        for name, ratio in CLIPS.get(self.clips, {}).items():
            whole = f"quant.clips={self.clips} sets it to {ratio}, so leave it out, or use quant.clips=none"
            _check(self, name, (1.0, ratio).__contains__, whole)
            object.__setattr__(self, name, ratio)  # before anything reads it
        widths = "w_bits embedding_bits head_bits a_bits k_bits v_bits"
        _check(self, widths, lambda n: n in BITS, "use 2 to 8 bits, or 16 = off")
        _check(self, "down_bits", lambda n: n in (0, *BITS[:-1]), "use 2 to 8 bits, or 0 for the same as quant.w_bits")
        if self.w_bits == 16:  # nothing would read them
            off = "quant.w_bits=16 leaves all weights as they are, so use"
            _check(self, "down_bits", lambda n: n == 0, f"{off} 0")
            _check(self, "embedding_bits head_bits", lambda n: n == 16, f"{off} 16")
        ratios, sizes = "a_clip_ratio k_clip_ratio v_clip_ratio", "w_group_size k_group_size v_group_size"
        _check(self, ratios, lambda x: 0 < x <= 1, "use a fraction above 0 and up to 1; 1 clips nothing")
        _check(self, sizes, lambda n: n >= 0, "use a number of channels, or 0 for the whole row or head")


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


@dataclass(frozen=True)
class QuantizeConfig:
    """quantize (making the quantised weights)."""

    method: Literal["gptq", "rtn", "none"] = "gptq"
    """GPTQ, round to nearest (rtn), or leave the weights as they are; GPTQ loses least."""
    source: str = "wikitext2"
    """Text that GPTQ calibrates on; same forms as optimize.source."""
    split: str = "train"
    """Part of the source; never the one that is evaluated."""
    seq_len: int = 2048
    """Length of one calibration sequence, tokens; the published length."""
    n_sequences: int = 128
    """Calibration sequences; the published number."""
    seed: int = 0
    """Seed of the random places where the calibration sequences start."""
    percdamp: float = 0.01
    """Damping of GPTQ's Hessian, as a fraction of its mean diagonal; raise it if the solve fails."""
    block_size: int = 128
    """Columns that GPTQ updates together; changes speed, hardly the result."""
    act_order: bool = False
    """Quantise the columns with the largest activations first; off as published."""
    clip_norm: float = 2.4
    """Exponent of the error that quant.w_mse_clip makes least: 2.4 as published; at 2 GPTQ loses less."""
    sweeps: int = 0
    """Passes after GPTQ that move each column's codes to where all other columns want them; 0: none, as published."""
    quantize_activations: bool = False
    """Keep activation, key and value quantisers on while calibrating; off as published."""
    layers_per_job: int = 0
    """Layers that see each other's rounding errors and are done by one job, others in parallel; 0: all, as published."""
    baselines: list[Literal["none", "hadamard", "orthogonal"]] = field(default_factory=list)
    """Unlearned rotations to quantise and evaluate beside the learned one, for comparison."""

    def __post_init__(self) -> None:
        check_source("quantize.source", self.source)
        _check(self, "seq_len n_sequences block_size", lambda n: n >= 1, "use 1 or more")
        _check(self, "seed", lambda n: n >= 0, "use 0 or more")
        _check(self, "layers_per_job", lambda n: n >= 0, "use a number of layers, or 0 for all")
        _check(self, "clip_norm", lambda x: 0 < x < math.inf, "use a number above 0, such as 2")
        _check(self, "sweeps", lambda n: n >= 0, "use 0 or more")
        _check(self, "percdamp", lambda x: 0 < x < math.inf, "use a fraction above 0, such as 0.01")
        _check(self, "baselines", lambda names: len(set(names)) == len(names), "name each rotation once")


@dataclass(frozen=True)
class MethodsConfig:
    """methods (other published methods, for comparison; they calibrate on the text of quantize)."""

    smooth_alphas: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    """SmoothQuant: strengths tried for each layer, from 0 (weights smooth) to 1 (activations smooth)."""
    flat_epochs: int = 15
    """FlatQuant, OmniQuant, AffineQuant: passes over the calibration text; FlatQuant's published number."""
    flat_batch_size: int = 4
    """FlatQuant, OmniQuant, AffineQuant: sequences per step; FlatQuant's published number."""
    flat_lr: float = 5e-3
    """FlatQuant, OmniQuant, AffineQuant: learning rate of transforms, that of clips is ten times it; FlatQuant's."""
    quik_columns: int = 256
    """QUIK: input channels of each site that stay at 16 bits, but at most a quarter of them; about the published number."""
    dart_share: float = 0.1
    """DartQuant: share of the calibration tokens whose activations are kept; published."""
    dart_epochs: int = 10
    """DartQuant: passes over the kept activations; published."""
    dart_batch_size: int = 64
    """DartQuant: calibration sequences whose kept activations of one site make a step; published."""
    dart_lr: float = 1e-3
    """DartQuant: learning rate of plain gradient descent; published."""
    qat_steps: int = 500
    """LLM-QAT: steps over quantize.n_sequences sequences that the model writes itself; published are 12500."""
    qat_batch_size: int = 8
    """LLM-QAT: sequences per step over all processes together; published."""
    qat_lr: float = 2e-5
    """LLM-QAT: learning rate of all weights, falling along a cosine; published."""

    def __post_init__(self) -> None:
        strengths = "use numbers from 0 to 1, such as [0.5]"
        _check(self, "smooth_alphas", lambda xs: bool(xs) and all(0 <= x <= 1 for x in xs), strengths)
        counts = "flat_epochs flat_batch_size dart_epochs dart_batch_size qat_steps qat_batch_size"
        _check(self, counts, lambda n: n >= 1, "use 1 or more")
        _check(self, "quik_columns", lambda n: n >= 0, "use a number of channels")
        _check(self, "flat_lr dart_lr qat_lr", lambda x: 0 < x < math.inf, "use a number above 0, such as 5e-3")
        _check(self, "dart_share", lambda x: 0 < x <= 1, "use a fraction above 0 and up to 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """evaluate (measuring perplexity and zero-shot tasks)."""

    sources: list[str] = field(default_factory=lambda: ["wikitext2"])
    """Texts to measure on, a list such as [wikitext2, c4]; same forms as optimize.source."""
    split: str = "test"
    """Part of each source; c4 has no test part and takes its validation part for it."""
    seq_len: int = 2048
    """Length of one sequence, tokens; the published length (perplexities of different lengths do not compare)."""
    max_sequences: int = 0
    """Sequences measured per source, from its start; 0 means all."""
    unquantized_weights: bool = False
    """Also measure every rotation with 16-bit weights: what learning achieved before the weights were rounded."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks of lm-evaluation-harness: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge,
    openbookqa, lambada_openai; none by default."""
    tasks_dir: str | None = None
    """Directory with copies of the tasks' data sets, OWNER/NAME as on the hub; null reads the hub or its local cache."""
    task_limit: int = 0
    """Items measured per task, from its start; 0 means all."""

    def __post_init__(self) -> None:
        some = "name at least one source, such as [wikitext2]"
        _check(self, "sources", lambda names: bool(names or self.tasks), some)
        for source in self.sources:
            check_source("evaluate.sources", source)
        _check(self, "sources", lambda names: SELF not in names, "the model's own text says nothing about its quality")
        _check(self, "sources", lambda names: len(set(names)) == len(names), "name each source once")
        _check(self, "seq_len", lambda n: n >= 2, "next-token loss needs 2 tokens or more")
        _check(self, "max_sequences task_limit", lambda n: n >= 0, "use a number, or 0 for all")
        _check(self, "tasks", lambda names: set(names) <= set(TASKS), f"use names out of {', '.join(TASKS)}")
        _check(self, "tasks", lambda names: len(set(names)) == len(names), "name each task once")


@dataclass(frozen=True)
class ExportConfig:
    """export (files for the runtimes that models are served with)."""

    target: Literal["none", "hf", "compressed-tensors", "gguf", "executorch"] = "none"
    """Format the run is made for; what no runtime of it accepts is then refused when the run starts, not at its end."""
    profile: Literal["no-had", "r4-block"] = "no-had"
    """What is rotated: R1 and R2 (no-had), which every runtime serves, or the input of down_proj too (r4-block)."""
    shard_gb: float = 5.0
    """Largest weights file, GB; a single tensor that is larger gets a file of its own."""
    gguf_converter: str | None = None
    """convert_hf_to_gguf.py of llama.cpp, its folder or a llama-cpp-python source package; download: fetch that with pip."""

    def __post_init__(self) -> None:
        _check(self, "shard_gb", lambda x: 0 < x < math.inf, "use a number above 0")


@dataclass(frozen=True)
class CompareConfig:
    """compare (the table of systems, bits and seeds)."""

    methods: list[str] = field(default_factory=COMPARED.split)
    """Rows: rtn and gptq (no rotation), hadamard and orthogonal (random, unlearned), quarot, quarot_no_clips,
    spinquant_no_had (R1 and R2 alone), spinquant_had (published update rule), ours (this run's settings), and the other
    methods that are built (smoothquant, flatquant, ...)."""
    bits: list[str] = field(default_factory=lambda: ["W4A16", "W4A8", "W4A4KV16", "W4A4KV4", "W4A8KV8"])
    """Columns: bits of weights, activations, and keys and values (16 if left out)."""
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
    """What several processes do: all of them each row (a model that is learned on all GPUs), or each takes whole rows alone,
    on one GPU, as they come; then processes may be started at any time, by torchrun or one by one."""

    def __post_init__(self) -> None:
        for name in ("methods", "bits", "weights", "seeds"):
            _check(self, name, bool, "name at least one")
        for name in ("methods", "bits", "weights", "seeds", "spread_bits"):
            _check(self, name, lambda values: len(set(values)) == len(values), "name each once")
        for name in ("bits", "spread_bits"):
            _check(
                self, name, lambda texts: all(map(bits_of, texts)), "write each as W4A4KV4 or W4A8, 2 to 8 or 16 bits"
            )
        _check(self, "seeds", lambda seeds: min(seeds) >= 0, "use 0 or more")
        _check(self, "spread_seeds", lambda n: n >= 0, "use a number of seeds, or 0 for none")


def bits_of(text: str) -> tuple[int, int, int] | None:
    """Bits of weights, activations, and of keys and values, of a text such as W4A4KV4; None if it is no such text."""
    found = re.fullmatch(r"W(\d+)A(\d+)(?:KV(\d+))?", text)
    if found is None:
        return None
    w, a, kv = (int(group or 16) for group in found.groups())
    return (w, a, kv) if {w, a, kv} <= set(BITS) else None


@dataclass(frozen=True)
class ReportConfig:
    """report (what is drawn of a run)."""

    sequences: int = 4
    """Calibration sequences whose activations are measured before and after rotation; 0 leaves that pass out."""
    tensorboard: bool = True
    """Write the figures of every learning step for TensorBoard too, to RUN/tensorboard."""

    def __post_init__(self) -> None:
        _check(self, "sequences", lambda n: n >= 0, "use a number, or 0 for none")


@dataclass(frozen=True)
class DistributedConfig:
    """distributed (processes and devices)."""

    nproc: int = 1
    """Processes that `dist-spin run` starts on this machine; torchrun and Slurm set their own number."""
    timeout_s: int = 600
    """Seconds that a process waits for the others before it gives up; above the slowest step and model load."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes CUDA where there is one."""
    offload_layers: int = -1
    """Decoder layers whose weights stay in host memory while rotations are learned; -1: as many as do not fit on the GPU, or
    more where that makes a step shorter."""
    offload_dir: str | None = None
    """With DeepSpeed: a directory on a fast local disk that holds the weights of those layers instead of host memory."""
    engine: Literal["auto", "fsdp", "deepspeed"] = "auto"
    """What shards the frozen weights: FSDP2 or DeepSpeed ZeRO-3, with the same results, so that a run may change it;
    auto: as accelerate's config says under `accelerate launch`, fsdp elsewhere."""
    shard_ranks: int = 0
    """With FSDP: processes that share one copy of the frozen weights (a divisor of all); 0: all. Fewer gather less, and
    need more memory."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores evenly among the processes of this machine."""

    def __post_init__(self) -> None:
        _check(self, "nproc timeout_s", lambda n: n >= 1, "use 1 or more")
        _check(self, "offload_layers", lambda n: n >= -1, "use a number of layers, or -1 to let memory decide")
        _check(self, "shard_ranks", lambda n: n >= 0, "use a number of processes, or 0 for all of them")
        _check(self, "threads", lambda n: n >= 0, "use a number, or 0 for an even share of the cores")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run."""

    name: str = "run"
    """Name of the run: its directory under output_dir."""
    output_dir: str = "runs"
    """Directory that holds the runs."""
    model: ModelConfig
    rotation: RotationConfig = field(default_factory=RotationConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if self.quant.arithmetic == "auto":  # before anything reads it; a run keeps it when its target changes
            target = self.export.target
            arithmetic = target if target == "compressed-tensors" else "fp32"
            object.__setattr__(self, "quant", replace(self.quant, arithmetic=arithmetic))
        name = "use a plain directory name; output_dir says where it lies"
        _check(self, "name", lambda text: text not in ("", ".", "..") and "/" not in text, name)
