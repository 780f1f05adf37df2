"""What a comparison measures: the systems of the published tables, and the settings under which each of them is a run."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dist_spin.compare.method_variants import METHODS
from dist_spin.config.checks import parse_bits
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.presets import resolve_clips
from dist_spin.config.quantize import QuantizeConfig
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.optimize.setup import FREE_SETTINGS
from dist_spin.pipeline.fingerprints import flat, site_settings
from dist_spin.storage.run_directory import LEARNED, run_dir
from dist_spin.storage.tensor_file import identity_hash

# What SpinQuant's rows take over from the run, so that all learn from the same data for as long; the rest as published.
BUDGET = (
    *("source", "split", "seq_len", "steps", "batch_size", "seed", "a_bits"),
    *("micro_batch_size", "keep_checkpoints", "recompute", "compile"),
)
OURS = ("cd_passes", "clip_norm")  # of rounding, where the published systems take the defaults


@dataclass(frozen=True)
class System:
    """One row of the published tables. rotation: a name that `variant` takes; "none" also where `METHODS` has its own way.

    weights: the one rounding that the row stands for. clips, online: the settings of `quant` and `rotation` that it is run with.
    """

    label: str
    rotation: str
    weights: str = ""
    clips: str = "none"
    online: bool = True


FULL = "full"
SYSTEMS = {
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
    **{name: System(label, "none") for name, label in METHODS.items()},
}


@dataclass(frozen=True)
class Entry:
    """What is compared: a method from one seed, its weights rounded in one way, at one width of weights, activations, KV."""

    method: str
    seed: int
    weights: str  # none, rtn or gptq
    bits: tuple[int, int, int]


def planned(config: RunConfig) -> list[Entry]:
    """Every entry of a comparison, none twice: the table of the first seed, the study of the spread, the other seeds.

    Raises:
        UserError: a method is not built.
    """
    c = config.compare
    for method in c.methods:
        if method not in SYSTEMS or method == FULL:
            known = ", ".join(name for name in SYSTEMS if name != FULL)
            raise UserError(f"compare.methods has '{method}', which is not built", f"use some of {known}")

    def entries(method: str, seed: int, weights: list[str], widths: list[str]) -> Iterator[Entry]:
        system = SYSTEMS[method]
        if system.rotation == "none":
            seed = config.rotation.seed
        for rounding in [system.weights] if system.weights else weights:
            for bits in filter(None, map(parse_bits, widths)):
                yield Entry(method, seed, rounding if bits[0] < 16 else "none", bits)

    plan = [*entries(FULL, 0, [], ["W16A16"])]
    for seed in c.seeds:
        for method in c.methods:
            plan += entries(method, seed, [*c.weights], c.bits)
        if c.spread_seeds:  # the learned ones are marked among the random ones
            plan += entries("ours", seed, [c.spread_weights], c.spread_bits)
        if seed == c.seeds[0]:
            for random in range(c.spread_seeds):
                for method in ("hadamard", "orthogonal"):
                    plan += entries(method, random, [c.spread_weights], c.spread_bits)
    return list(dict.fromkeys(plan))


def group(entry: Entry) -> tuple[str, int, str]:
    """Entries that are equal here have the same rotations and rounding: they may share their weights."""
    rotation = SYSTEMS[entry.method].rotation
    apart = rotation == LEARNED or entry.method in METHODS
    return entry.method if apart else rotation, entry.seed, entry.weights


def settings_of(config: RunConfig, method: str, seed: int, weights: str) -> RunConfig:
    """The run as `method` would have it, from `seed`: the run itself where that changes nothing, else one inside it.

    SpinQuant learns with 16-bit weights where GPTQ follows and with rounded ones where nothing does better (Liu et al. 2024).
    What is learned under other settings lies in another directory, so that nothing stale is taken for it.
    """
    system, rotation, learning = SYSTEMS[method], config.rotation, config.optimize
    changed = config
    if seed != rotation.seed:
        rotation = dataclasses.replace(rotation, seed=seed)
        learning = dataclasses.replace(learning, seed=seed if learning.seed >= 0 else learning.seed)
        changed = dataclasses.replace(config, rotation=rotation, optimize=learning)
    if method != "ours":
        clips: dict[str, Any] = dict.fromkeys(("a_clip_ratio", "k_clip_ratio", "v_clip_ratio"), 1.0)
        clips["clips"] = system.clips
        kept = {name: getattr(learning, name) for name in BUDGET}
        changed = dataclasses.replace(
            config,
            rotation=dataclasses.replace(rotation, init="hadamard", load=None, online=system.online),
            quant=resolve_clips(dataclasses.replace(config.quant, **clips)),
            optimize=OptimizeConfig(**kept, w_bits=config.quant.w_bits if weights == "rtn" else 16),
            quantize=dataclasses.replace(config.quantize, **{name: getattr(QuantizeConfig, name) for name in OURS}),
        )
    if changed == config:
        return config
    learned = {k: v for k, v in flat(changed.optimize, "optimize").items() if k.split(".")[1] not in FREE_SETTINGS}
    quant = site_settings(changed) if changed.optimize.w_bits == 16 else flat(changed.quant, "quant")
    decides = {**vars(changed.model), **flat(changed.rotation, "rotation"), **quant, **learned}
    name = f"{method}-seed{seed}-{identity_hash(decides)[:8]}"
    return dataclasses.replace(changed, output_dir=str(run_dir(config).path / "compare"), name=name)


def at_bits(config: RunConfig, weights: str, bits: tuple[int, int, int]) -> RunConfig:
    """The same with the widths and the rounding of an entry."""
    w, a, kv = bits
    widths: dict[str, Any] = {"w_bits": w, "a_bits": a, "k_bits": kv, "v_bits": kv}
    method: Any = weights
    if w == 16:
        widths |= {"down_bits": 0, "embedding_bits": 16, "head_bits": 16}
    return dataclasses.replace(
        config,
        quant=dataclasses.replace(config.quant, **widths),
        quantize=dataclasses.replace(config.quantize, method=method),
    )


def clips_text(config: RunConfig) -> str:
    """The clip ratios of a configuration in a word: none, quarot, or the ratios."""
    q = config.quant
    ratios = (q.a_clip_ratio, q.k_clip_ratio, q.v_clip_ratio)
    known = {(1.0, 1.0, 1.0): "none", (0.9, 0.95, 0.95): "quarot"}
    return known.get(ratios, "a{:g} k{:g} v{:g}".format(*ratios))


Group = list[Entry]  # that share rotations and rounding


def parts_of(config: RunConfig, plan: list[Entry]) -> dict[str, list[Group]]:
    """The groups of a plan in parts that different processes can do at once, since none learns what another one does.

    They come as planned; where processes share them out, those that learn rotations come first, since they take longest.
    """
    found: dict[str, dict[Any, Group]] = {}
    for entry in plan:
        which = group(entry)
        name = f"{which[0]}-seed{entry.seed}" + ("" if entry.method in METHODS else f"-{entry.weights}")
        if SYSTEMS[entry.method].rotation == LEARNED:
            base = settings_of(config, entry.method, entry.seed, entry.weights)
            name = "learned" if base is config else base.name
        found.setdefault(name, {}).setdefault(which, []).append(entry)

    def quick(name: str) -> bool:
        apart = config.compare.parallel == "rows"
        return apart and all(SYSTEMS[e.method].rotation != LEARNED for some in found[name].values() for e in some)

    return {name: [*found[name].values()] for name in sorted(found, key=quick)}
