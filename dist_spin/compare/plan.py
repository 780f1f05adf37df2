"""What a comparison measures: the systems of the published tables, and the settings under which each of them is a run."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dist_spin.compare.methods.registry import METHODS
from dist_spin.config.bit_columns import INTS, Formats, Widths, parse_column
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.presets import resolve_clips
from dist_spin.config.quantize import QuantizeConfig
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.numerics.formats import FORMATS
from dist_spin.optimize.setup import FREE_SETTINGS
from dist_spin.pipeline.fingerprints import flat, site_settings
from dist_spin.pipeline.model import nothing_to_tune
from dist_spin.storage.run_directory import LEARNED, run_dir
from dist_spin.storage.tensor_file import identity_hash

# Settings of `optimize` that SpinQuant's rows take from the run, so that all learn from the same data for as long; the rest
# is as published.
BUDGET = (
    *("source", "split", "seq_len", "steps", "batch_size", "seed", "a_bits"),
    *("micro_batch_size", "keep_checkpoints", "recompute", "compile"),
)
# Settings of `quantize` for which the published systems take the defaults.
OURS = ("cd_passes", "clip_norm", "tune_steps", "tune_lr", "expert_tokens")


@dataclass(frozen=True)
class System:
    """One row of the published tables.

    rotation: a name that `build_variant` takes; "none" for one of `METHODS`. weights: the rounding, if the row stands for one.
    clips, online: the settings of `quant` and `rotation` that it is run with. is_method: it is one of `METHODS`.
    """

    label: str
    rotation: str
    weights: str = ""
    clips: str = "none"
    online: bool = True
    is_method: bool = False

    @property
    def learns_rotations(self) -> bool:
        """Whether it optimizes rotations first, which takes longest."""
        return self.rotation == LEARNED


FULL = "full"
ROTATION_SYSTEMS = {
    FULL: System("full precision", "none", "none"),
    "rtn": System("RTN", "none", "rtn"),
    "gptq": System("GPTQ", "none", "gptq"),
    "hadamard": System("random Hadamard", "hadamard"),
    "orthogonal": System("random orthogonal", "orthogonal"),
    "quarot": System("QuaRot", "quarot", clips="quarot"),
    "quarot_no_clips": System("QuaRot", "quarot"),
    "spinquant_no_had": System("SpinQuant (no had)", LEARNED, online=False),
    "spinquant_had": System("SpinQuant (had)", LEARNED),
    "ours": System("ours", LEARNED),
}


def all_systems() -> dict[str, System]:
    """Every system that can be compared, by the name it has in `compare.methods`."""
    methods = {name: System(method.label, "none", is_method=True) for name, method in METHODS.items()}
    return ROTATION_SYSTEMS | methods


@dataclass(frozen=True)
class Trial:
    """One cell of the table from one seed: a system, the rounding of its weights, and the bits of weights, activations, KV.

    formats: of the same three.
    """

    method: str  # a name of `all_systems`
    seed: int
    weights: str  # none, rtn or gptq
    bits: Widths
    formats: Formats = INTS

    @property
    def system(self) -> System:
        """The system that is tried."""
        return all_systems()[self.method]


def plan_trials(config: RunConfig) -> list[Trial]:
    """Every trial of a comparison, none twice: the table of the first seed, the study of the spread, the other seeds.

    Raises:
        UserError: a method is not built, or has no place for a number format.
    """
    c, systems = config.compare, all_systems()
    for method in c.methods:
        if method not in systems or method == FULL:
            known = ", ".join(name for name in systems if name != FULL)
            raise UserError(f"compare.methods has '{method}', which is not built", f"use some of {known}")

    def trials(method: str, seed: int, weights: list[str], widths: list[str]) -> Iterator[Trial]:
        system = systems[method]
        if system.rotation == "none":
            seed = config.rotation.seed
        for rounding in [system.weights] if system.weights else weights:
            for bits, formats in filter(None, map(parse_column, widths)):
                if system.is_method and formats != INTS:
                    problem = f"compare.methods has '{method}', which is for integers, and compare.bits {formats}"
                    raise UserError(problem, "compare it in a run without columns of number formats")
                yield Trial(method, seed, rounding if bits[0] < 16 else "none", bits, formats)

    plan = [*trials(FULL, 0, [], ["W16A16"])]
    for seed in c.seeds:
        for method in c.methods:
            plan += trials(method, seed, [*c.weights], c.bits)
        if c.spread_seeds:  # the learned rotations are marked among the random ones
            plan += trials("ours", seed, [c.spread_weights], c.spread_bits)
        if seed == c.seeds[0]:
            for random_seed in range(c.spread_seeds):
                for method in ("hadamard", "orthogonal"):
                    plan += trials(method, random_seed, [c.spread_weights], c.spread_bits)
    return list(dict.fromkeys(plan))


def sharing_key(trial: Trial) -> tuple[str, int, str]:
    """Equal for trials that have the same rotations and the same rounding, which may therefore share their weights."""
    system = trial.system
    by_method = system.learns_rotations or system.is_method
    return trial.method if by_method else system.rotation, trial.seed, trial.weights


def settings_of(config: RunConfig, method: str, seed: int, weights: str) -> RunConfig:
    """The settings of the run for a system and a seed: those of the run itself where nothing differs, else of a run inside it.

    SpinQuant learns with 16-bit weights where GPTQ follows, and with weights rounded to nearest otherwise (Liu et al. 2024).
    The name of the inner run has a hash of the settings that decide what it learns, so that nothing stale is used.
    """
    system, rotation, learning = all_systems()[method], config.rotation, config.optimize
    changed = config
    if seed != rotation.seed:
        rotation = dataclasses.replace(rotation, seed=seed)
        learning = dataclasses.replace(learning, seed=seed if learning.seed >= 0 else learning.seed)
        changed = dataclasses.replace(config, rotation=rotation, optimize=learning)
    if method != "ours":
        clips: dict[str, Any] = dict.fromkeys(("a_clip_ratio", "k_clip_ratio", "v_clip_ratio"), 1.0)
        whole = config.quant.a_format == config.quant.kv_format == "int"  # other formats clip nothing
        if not whole and not system.learns_rotations:  # `at_bits` sets those of the column
            clips |= {"a_format": "int", "kv_format": "int"}
        clips["clips"] = system.clips if whole or not system.learns_rotations else "none"
        budget = {name: getattr(learning, name) for name in BUDGET}
        # Published systems rotate whole sizes; the random ones are what ours starts from, and have its blocks.
        blocks: dict[str, Any] = {} if method in ("hadamard", "orthogonal") else {"block": 0, "block_shared": False}
        changed = dataclasses.replace(
            config,
            rotation=dataclasses.replace(rotation, init="hadamard", load=None, online=system.online, **blocks),
            quant=resolve_clips(dataclasses.replace(config.quant, **clips)),
            optimize=OptimizeConfig(**budget, w_bits=config.quant.w_bits if weights == "rtn" else 16),
            quantize=dataclasses.replace(config.quantize, **{name: getattr(QuantizeConfig, name) for name in OURS}),
        )
    if changed == config:
        return config
    learned = {k: v for k, v in flat(changed.optimize, "optimize").items() if k.split(".")[1] not in FREE_SETTINGS}
    quant = site_settings(changed) if changed.optimize.w_bits == 16 else flat(changed.quant, "quant")
    identity = {**vars(changed.model), **flat(changed.rotation, "rotation"), **quant, **learned}
    name = f"{method}-seed{seed}-{identity_hash(identity)[:8]}"
    return dataclasses.replace(changed, output_dir=str(run_dir(config).path / "compare"), name=name)


def at_bits(config: RunConfig, weights: str, bits: Widths, formats: Formats = INTS) -> RunConfig:
    """The configuration with the rounding of a trial and its bits and formats of weights, activations, KV.

    Groups, zero points and clips that a format has no place for are left out.
    """
    w, a, kv = bits
    widths: dict[str, Any] = {"w_bits": w, "a_bits": a, "k_bits": kv, "v_bits": kv}
    widths |= dict(zip(("w_format", "a_format", "kv_format"), formats, strict=True))
    if formats[0] != "int":
        widths |= {"w_group_size": 0, "w_symmetric": True, "down_bits": 0}
    for name, prefixes in ((formats[1], "a"), (formats[2], "kv")):
        for prefix in prefixes if name != "int" else "":
            widths |= {f"{prefix}_group_size": 0, f"{prefix}_clip_ratio": 1.0, "clips": "none"}
    if formats[1] != "int" and FORMATS[formats[1]].group:
        widths["o_per_head"] = False
    method: Any = weights
    if w == 16:
        widths |= {"down_bits": 0, "embedding_bits": 16, "head_bits": 16}
    rounded = dataclasses.replace(
        config,
        quant=dataclasses.replace(config.quant, **widths),
        quantize=dataclasses.replace(config.quantize, method=method),
    )
    if nothing_to_tune(rounded):
        return dataclasses.replace(rounded, quantize=dataclasses.replace(rounded.quantize, tune_steps=0))
    return rounded


def clips_text(config: RunConfig) -> str:
    """The clip ratios of a configuration as a text: none, quarot, or the ratios."""
    q = config.quant
    ratios = (q.a_clip_ratio, q.k_clip_ratio, q.v_clip_ratio)
    names = {(1.0, 1.0, 1.0): "none", (0.9, 0.95, 0.95): "quarot"}
    return names.get(ratios, "a{:g} k{:g} v{:g}".format(*ratios))


TrialGroup = list[Trial]  # with equal `sharing_key`


def work_units(config: RunConfig, plan: list[Trial]) -> dict[str, list[TrialGroup]]:
    """The trials of a plan in groups, and these in named units that different processes can do at once.

    No unit learns what another one learns. Units come as planned; where processes share them out, those that optimize
    rotations come first, since they take longest.
    """
    units: dict[str, dict[Any, TrialGroup]] = {}
    for trial in plan:
        key = sharing_key(trial)
        name = f"{key[0]}-seed{trial.seed}" + ("" if trial.system.is_method else f"-{trial.weights}")
        if trial.system.learns_rotations:
            base = settings_of(config, trial.method, trial.seed, trial.weights)
            name = "learned" if base is config else base.name
        units.setdefault(name, {}).setdefault(key, []).append(trial)

    def comes_last(name: str) -> bool:
        shared_out = config.compare.parallel == "rows"
        learns = any(trial.system.learns_rotations for group in units[name].values() for trial in group)
        return shared_out and not learns

    return {name: [*units[name].values()] for name in sorted(units, key=comes_last)}
