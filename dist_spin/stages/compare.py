"""Measure every system of the published tables that shares our sites and solver, at several bit widths and seeds.

    dist-spin compare configs/compare.yaml
    torchrun --nproc_per_node 2 -m dist_spin compare configs/compare.yaml

A row is this run under other settings: it goes through the same quantising and measuring, in a directory of its own under
RUN/compare. Rows that round the same weights share them, whatever their activations. Every measurement is a file in
RUN/evaluations, so that a second start does only what is missing; the weights are removed once they are measured.
"""

import dataclasses
import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from dist_spin.distributed import World, any_rank, on_leader
from dist_spin.errors import Interrupted, UserError
from dist_spin.layer_files import ends_path, identity_hash, layer_path
from dist_spin.model.loading import ModelFiles
from dist_spin.rundir import RunDir, read_metadata
from dist_spin.settings import OptimizeConfig, RunConfig, bits_of
from dist_spin.signals import StopRequest
from dist_spin.stages.common import flat, model_dtype, open_configured_model, run_dir, say, sites_for, writing
from dist_spin.stages.compare_table import comparison_table, row_key
from dist_spin.stages.evaluate import Cell, described, measured_before, measuring_tokens, recorded, window_losses
from dist_spin.stages.methods import METHODS, learn, method_variant
from dist_spin.stages.optimize import FREE_SETTINGS, optimize
from dist_spin.stages.quantize import (
    LEARNED,
    Variant,
    Work,
    calibration_tokens,
    ends_of,
    layer_identity,
    quantize_variant,
    site_settings,
    variant,
)
from dist_spin.stages.results import public, results, update_results

STATES_TOGETHER = 1 << 33  # bytes of hidden states that wait beside one another for the same layer
# What SpinQuant's rows take over from the run, so that all learn from the same data for as long; the rest as published.
BUDGET = (
    *("source", "split", "seq_len", "steps", "batch_size", "seed"),
    *("micro_batch_size", "keep_checkpoints", "recompute", "compile"),
)


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
            for bits in filter(None, map(bits_of, widths)):
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
            quant=dataclasses.replace(config.quant, **clips),
            optimize=OptimizeConfig(**kept, w_bits=config.quant.w_bits if weights == "rtn" else 16),
            quantize=dataclasses.replace(config.quantize, tune_epochs=0),
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


@dataclass
class Candidate:
    """An entry with what it takes to measure it."""

    entry: Entry
    config: RunConfig  # of the entry; its directory is where its layers are made
    cell: Cell
    rows: list[dict[str, Any]]  # one a source, without figures where it was not measured before

    def missing(self) -> list[int]:
        """The sources that it is to be measured on."""
        return [i for i, row in enumerate(self.rows) if "ppl" not in row]


@dataclass
class Comparison:
    """A comparison at work."""

    config: RunConfig
    world: World
    files: ModelFiles
    stop: StopRequest
    texts: dict[str, Tensor]  # source -> windows [n, T]

    @property
    def run(self) -> RunDir:
        """The directory of the run that is compared."""
        return run_dir(self.config)

    @cached_property
    def calibration(self) -> Tensor:
        """What weights are rounded on."""
        return calibration_tokens(self.config, self.files)

    def candidates(self, entries: list[Entry]) -> list[Candidate]:
        """Entries of one `group`; what is to be learned for them and missing is learned first."""
        rotation, weights = SYSTEMS[entries[0].method].rotation, entries[0].weights
        base = settings_of(self.config, entries[0].method, entries[0].seed, weights)
        if rotation == LEARNED:
            self.learn(base)
        first = variant(base, self.files, rotation, self.world.device)
        out = []
        for entry in entries:
            system = SYSTEMS[entry.method]
            config = at_bits(settings_of(self.config, entry.method, entry.seed, weights), weights, entry.bits)
            chosen = self.own_way(config, entry.method) if entry.method in METHODS else self.at_sites(first, config)
            cell = Cell(chosen, weights, full_precision=entry.method == FULL)
            if weights != "none":
                cell.made_under = identity_hash(layer_identity(config, self.files, cell.chosen, self.calibration))
            online = config.rotation.online and chosen.rotations is not None
            cell.about = {"system": system.label, "clips": clips_text(config), "online": online}
            rows = [described(config, self.files, cell, source, tokens) for source, tokens in self.texts.items()]
            rows = [measured_before(self.run, row) or row for row in rows]
            out.append(Candidate(entry, config, cell, rows))
        return out

    def at_sites(self, chosen: Variant, config: RunConfig) -> Variant:
        """A variant with the sites of `config`."""
        rotated, heads = chosen.rotations is not None, bool(chosen.sites.heads)
        return dataclasses.replace(chosen, sites=sites_for(config, self.files.shape, rotated=rotated, heads=heads))

    def own_way(self, config: RunConfig, method: str) -> Variant:
        """What one of `METHODS` makes for the bits of `config`, learned in the run's own directory unless it is there."""
        here = dataclasses.replace(config, output_dir=self.config.output_dir, name=self.config.name)
        learn(here, self.world, self.files, method, stop=self.stop)
        return method_variant(here, self.files, method, self.world.device, self.calibration)

    def learn(self, base: RunConfig) -> None:
        """Learn the rotations of a configuration, unless they are there."""
        if not on_leader((run_dir(base).rotations / "final.safetensors").exists):
            with writing(base, self.world, "optimize"):
                optimize(base, self.world, self.stop)
            gc.collect()  # sharded modules hold themselves in circles, and what comes next needs their memory

    def measure(self, together: list[Candidate]) -> None:
        """Measure what is missing of candidates that share their weights, and fill it into their rows."""
        jobs = [(candidate, i) for candidate in together for i in candidate.missing()]
        if not jobs:
            return
        first = together[0]
        config = first.config if first.cell.weights == "none" else self.rounded(first)
        texts = list(self.texts.values())
        for some in self.fitting(jobs):
            began = time.monotonic()
            what = f"measure {first.cell.label}, {first.cell.weights} weights, seed {first.entry.seed}, {len(some)} at once"
            pairs = [(candidate.cell.chosen.sites, texts[i]) for candidate, i in some]
            losses = window_losses(config, self.world, self.files, first.cell, pairs, what)
            seconds = (time.monotonic() - began) / len(some)
            for (candidate, i), mean in zip(some, losses, strict=True):
                candidate.rows[i] = recorded(self.run, candidate.rows[i], mean, seconds)
        made = run_dir(config).path
        if first.cell.weights != "none" and made != self.run.path and not self.config.compare.keep_layers:
            on_leader(lambda: shutil.rmtree(made))

    def fitting(self, jobs: list[tuple[Candidate, int]]) -> Iterator[list[tuple[Candidate, int]]]:
        """The jobs in lists whose hidden states have room beside one another."""
        widths = [tokens.numel() for tokens in self.texts.values()]
        per_token = self.files.shape.hidden * model_dtype(self.config).itemsize / self.world.size
        some: list[tuple[Candidate, int]] = []
        for job in jobs:
            if some and sum(widths[i] for _, i in (*some, job)) * per_token > STATES_TOGETHER:
                yield some
                some = []
            some.append(job)
        yield some

    def rounded(self, candidate: Candidate) -> RunConfig:
        """The candidate's configuration in the directory where its layers are: of the run itself, or made now."""
        entry, made_under = candidate.entry, candidate.cell.made_under
        own = dataclasses.replace(candidate.config, output_dir=self.config.output_dir, name=self.config.name)
        if on_leader(lambda: self.finished(own, candidate)):
            return own
        name = f"{entry.method}-seed{entry.seed}-{entry.weights}-{made_under[:12]}"
        config = dataclasses.replace(candidate.config, output_dir=str(self.run.path / "compare"), name=name)
        quantize_variant(Work(config, self.world, self.files, candidate.cell.chosen, self.calibration, self.stop))
        return config

    def finished(self, config: RunConfig, candidate: Candidate) -> bool:
        """Whether the candidate's layers lie in the directory of `config`."""
        chosen = candidate.cell.chosen
        directory = run_dir(config).layers("" if chosen.name == LEARNED else chosen.name)
        paths = [(layer_path(directory, i), candidate.cell.made_under) for i in range(self.files.shape.layers)]
        ends = ends_of(config, self.files, chosen)
        if ends.bits:
            paths.append((ends_path(directory), ends.made_under))
        return all((read_metadata(path) or {}).get("fingerprint") == made_under for path, made_under in paths)


def compare(config: RunConfig, world: World) -> list[dict[str, Any]]:
    """Measure every entry that is missing, write results.json as they come and print the table; returns the rows.

    Raises:
        Interrupted: a signal came; what was measured or learned is kept.
        UserError: a setting does not fit the model, or a text cannot be read.
    """
    stop, files = StopRequest(), open_configured_model(config)
    texts = {source: measuring_tokens(config, files, source) for source in config.evaluate.sources}
    work = Comparison(config, world, files, stop, texts)
    plan = planned(config)
    groups: dict[tuple[str, int, str], list[Entry]] = {}
    for entry in plan:
        groups.setdefault(group(entry), []).append(entry)
    run = work.run
    shown = {row_key(row): row for row in on_leader(lambda: results(run, "compare"))}  # in results.json meanwhile
    rows: dict[Any, dict[str, Any]] = {}
    for number, entries in enumerate(groups.values(), 1):
        candidates = work.candidates(entries)
        shared: dict[tuple[str, int], list[Candidate]] = {}
        for candidate in candidates:
            shared.setdefault((candidate.cell.made_under, candidate.entry.bits[0]), []).append(candidate)
        for together in shared.values():
            work.measure(together)
            rows.update((row_key(row), public(row)) for candidate in together for row in candidate.rows)
            shown.update(rows)
            on_leader(lambda: update_results(run, "compare", [*shown.values()]))
            if any_rank(bool(stop)):
                what = f"stopped by a signal with {number - 1} of {len(groups)} groups of the table complete"
                raise Interrupted(what, "the same command continues")
    found = list(rows.values())
    on_leader(lambda: update_results(run, "compare", found))
    if world.leads:
        print(comparison_table(found))
        say(f"wrote {run.path / 'results.json'}")
    return found
