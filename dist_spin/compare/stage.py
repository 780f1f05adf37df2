"""Measure every system of the published tables that shares our sites and solver, at several bit widths and seeds.

    dist-spin compare configs/compare.yaml
    torchrun --nproc_per_node 4 -m dist_spin compare configs/compare.yaml                         a row on all GPUs
    torchrun --nproc_per_node 4 -m dist_spin compare configs/compare.yaml compare.parallel=rows   a row on each GPU

A row is this run under other settings: it goes through the same quantising and measuring, in a directory of its own under
RUN/compare. Rows that round the same weights share them, whatever their activations. Every measurement is a file in
RUN/evaluations, so that a second start does only what is missing; the weights are removed once they are measured.
"""

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dist_spin.compare.method_variants import METHODS, learn, method_variant
from dist_spin.compare.plan import FULL, SYSTEMS, Entry, Group, at_bits, clips_text, parts_of, planned, settings_of
from dist_spin.config.loader import dump_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted
from dist_spin.evaluate.perplexity import described, measured_before, measuring_tokens, recorded, window_losses
from dist_spin.evaluate.tables import comparison_table, row_key
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.model.weights import ModelFiles
from dist_spin.optimize.train import train
from dist_spin.pipeline.embeddings import embeddings_of
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.fingerprints import layer_identity
from dist_spin.pipeline.model import model_dtype, open_configured_model
from dist_spin.pipeline.quant_sites import clips_at, site_bits, sites_for
from dist_spin.pipeline.stage_context import writing
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens
from dist_spin.quantize.stage import QuantizeJob, quantize_variant
from dist_spin.runtime.distributed import World, any_rank, on_rank0
from dist_spin.runtime.progress import say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import write_text
from dist_spin.storage.locks import Held, Lock
from dist_spin.storage.quantized_layers import embeddings_path, layer_path
from dist_spin.storage.results import merge_results, public, update_results
from dist_spin.storage.run_directory import LEARNED, RunDir, run_dir
from dist_spin.storage.tensor_file import identity_hash, read_metadata

STATES_TOGETHER = 1 << 33  # bytes of hidden states that wait beside one another for the same layer


@dataclass
class Candidate:
    """An entry with what it takes to measure it."""

    entry: Entry
    config: RunConfig  # of the entry; its directory is where its layers are made
    target: EvalTarget
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
    rows: dict[Entry, list[dict[str, Any]]] = field(default_factory=dict)  # what is measured so far

    @property
    def run(self) -> RunDir:
        """The directory of the run that is compared."""
        return run_dir(self.config)

    @cached_property
    def calibration(self) -> Tensor:
        """What weights are rounded on."""
        return calibration_tokens(self.config, self.files)

    def complete(self, parts: dict[str, list[Group]]) -> dict[str, list[Group]]:
        """Measure what is missing of parts of the plan, one after the other; returns those that other processes are at.

        Raises:
            Interrupted: a signal came.
        """
        others = {}
        for name, groups in parts.items():
            with contextlib.ExitStack() as held:
                if self.config.compare.parallel == "rows":
                    try:
                        held.enter_context(Lock(self.run.path / "locks" / f"rows.{name}.lock", f"rows of {name}"))
                    except Held:
                        others[name] = groups
                        continue
                for entries in groups:
                    self.complete_group(entries)
        return others

    def complete_group(self, entries: Group) -> None:
        """Measure what is missing of entries that share their rotations."""
        shared: dict[tuple[str, int], list[Candidate]] = {}
        for candidate in self.candidates(entries):
            shared.setdefault((candidate.target.fingerprint, candidate.entry.bits[0]), []).append(candidate)
        for sharing in shared.values():
            self.measure(sharing)
            self.note({candidate.entry: [public(row) for row in candidate.rows] for candidate in sharing})
            if any_rank(bool(self.stop)):
                done = f"{len(self.rows)} rows of the table are there"
                raise Interrupted(f"stopped by a signal; {done}", "the same command continues")

    def note(self, found: dict[Entry, list[dict[str, Any]]]) -> None:
        """Keep rows, and show them in results.json."""
        self.rows |= found
        rows = [row for some in found.values() for row in some]
        on_rank0(lambda: merge_results(self.run, "compare", rows, row_key))

    def candidates(self, entries: Group) -> list[Candidate]:
        """Entries of one `group`; what is to be learned for them and missing is learned first."""
        rotation, weights = SYSTEMS[entries[0].method].rotation, entries[0].weights
        base = settings_of(self.config, entries[0].method, entries[0].seed, weights)
        if rotation == LEARNED:
            self.learn(base)
        first = build_variant(base, self.files, rotation, self.world.device)
        out = []
        for entry in entries:
            system = SYSTEMS[entry.method]
            config = at_bits(settings_of(self.config, entry.method, entry.seed, weights), weights, entry.bits)
            variant = (
                self.own_way(config, entry.method) if entry.method in METHODS else self.at_sites(first, config, base)
            )
            target = EvalTarget(variant, weights, full_precision=entry.method == FULL)
            if weights != "none":
                target.fingerprint = identity_hash(layer_identity(config, self.files, target.variant, self.calibration))
            online = config.rotation.online and variant.rotations is not None
            target.about = {"system": system.label, "clips": clips_text(config), "online": online}
            rows = [described(config, self.files, target, source, tokens) for source, tokens in self.texts.items()]
            rows = [measured_before(self.run, row) or row for row in rows]
            out.append(Candidate(entry, config, target, rows))
        return out

    def at_sites(self, variant: Variant, config: RunConfig, base: RunConfig) -> Variant:
        """A variant, learned under `base`, with the sites of `config`."""
        rotated, heads = variant.rotations is not None, bool(variant.sites.heads)
        sites = sites_for(config, self.files.shape, rotated=rotated, heads=heads)
        if (clips := variant.sites.clips) is not None:
            sites = dataclasses.replace(sites, clips=clips_at(config, site_bits(base), clips))
        return dataclasses.replace(variant, sites=sites)

    def own_way(self, config: RunConfig, method: str) -> Variant:
        """What one of `METHODS` makes for the bits of `config`, learned in the run's own directory unless it is there."""
        here = dataclasses.replace(config, output_dir=self.config.output_dir, name=self.config.name)
        learn(here, self.world, self.files, method, stop=self.stop)
        return method_variant(here, self.files, method, self.world.device, self.calibration)

    def learn(self, base: RunConfig) -> None:
        """Learn the rotations of a configuration, unless they are there."""
        if not on_rank0((run_dir(base).rotations / "final.safetensors").exists):
            with writing(base, self.world, "optimize"):
                train(base, self.world, self.stop)
            gc.collect()  # sharded modules hold themselves in circles, and what comes next needs their memory

    def measure(self, candidates: list[Candidate]) -> None:
        """Measure what is missing of candidates that share their weights, and fill it into their rows."""
        jobs = [(candidate, i) for candidate in candidates for i in candidate.missing()]
        first = candidates[0]
        if jobs:
            config = first.config if first.target.weights == "none" else self.rounded(first)
            texts = list(self.texts.values())
            for some in self.fitting(jobs):
                began = time.monotonic()
                target, seed = first.target, first.entry.seed
                what = f"measure {target.label}, {target.weights} weights, seed {seed}, {len(some)} at once"
                pairs = [(candidate.target.variant.sites, texts[i]) for candidate, i in some]
                losses = window_losses(config, self.world, self.files, first.target, pairs, what)
                seconds = (time.monotonic() - began) / len(some)
                for (candidate, i), mean in zip(some, losses, strict=True):
                    candidate.rows[i] = recorded(self.run, candidate.rows[i], mean, seconds)
        if first.target.weights != "none" and not self.config.compare.keep_layers:
            # Also where nothing was missing: a process that was killed once it had measured left its layers.
            made = run_dir(self.for_rows(first)).path
            on_rank0(lambda: shutil.rmtree(made) if made.exists() else None)

    def for_rows(self, candidate: Candidate) -> RunConfig:
        """The candidate's configuration in a directory of its own, for layers that only its rows need."""
        entry, fingerprint = candidate.entry, candidate.target.fingerprint
        name = f"{entry.method}-seed{entry.seed}-{entry.weights}-{fingerprint[:12]}"
        return dataclasses.replace(candidate.config, output_dir=str(self.run.path / "compare"), name=name)

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
        own = dataclasses.replace(candidate.config, output_dir=self.config.output_dir, name=self.config.name)
        if on_rank0(lambda: self.finished(own, candidate)):
            return own
        config = self.for_rows(candidate)
        quantize_variant(
            QuantizeJob(config, self.world, self.files, candidate.target.variant, self.calibration, self.stop)
        )
        return config

    def finished(self, config: RunConfig, candidate: Candidate) -> bool:
        """Whether the candidate's layers lie in the directory of `config`."""
        variant = candidate.target.variant
        directory = run_dir(config).layers(variant.name)
        paths = [(layer_path(directory, i), candidate.target.fingerprint) for i in range(self.files.shape.layers)]
        embeddings = embeddings_of(config, self.files, variant)
        if embeddings.bits:
            paths.append((embeddings_path(directory), embeddings.fingerprint))
        return all((read_metadata(path) or {}).get("fingerprint") == fingerprint for path, fingerprint in paths)


def compare(config: RunConfig, world: World) -> list[dict[str, Any]]:
    """Measure every entry that is missing, write results.json as they come and print the table; returns the rows.

    With `compare.parallel=rows` this is one of several processes, of which the last to end prints the table.

    Raises:
        Interrupted: a signal came; what was measured or learned is kept.
        UserError: a setting does not fit the model, or a text cannot be read.
    """
    stop, files = StopRequest(), open_configured_model(config)
    check_export_target(config, files.config)
    texts = {source: measuring_tokens(config, files, source) for source in config.evaluate.sources}
    comparison = Comparison(config, world, files, stop, texts)
    plan, run = planned(config), comparison.run
    on_rank0(lambda: note_start(run, config, len(plan) * len(texts)))
    parts = parts_of(config, plan)
    if others := comparison.complete(comparison.complete(parts)):  # a second look at what others were at
        say(f"other processes are at {', '.join(others)}; the last one to end shows the table")
        return [row for rows in comparison.rows.values() for row in rows]
    found = [row for entry in plan for row in comparison.rows[entry]]
    on_rank0(lambda: update_results(run, "compare", found))
    if world.is_rank0:
        print(comparison_table(found))
        say(f"wrote {run.path / 'results.json'}")
    return found


def note_start(run: RunDir, config: RunConfig, rows: int) -> None:
    """Keep what the report tells of a comparison: how many rows it will have, and its settings unless a stage has done so."""
    if not (run.path / "config.yaml").exists():
        write_text(run.path / "config.yaml", dump_config(config))
    run.event("compare", rows=rows)
