"""Measure every system of the published tables on the same quantisers and solver, at several bit widths and seeds.

    dist-spin compare configs/compare.yaml
    torchrun --nproc_per_node 4 -m dist_spin compare configs/compare.yaml                         a row on all GPUs
    torchrun --nproc_per_node 4 -m dist_spin compare configs/compare.yaml compare.parallel=rows   a row on each GPU

A row is this run under other settings: its weights are quantised and measured by the same stages, in a directory of its own
under RUN/compare. Rows with the same quantised weights share them, whatever the bits of their activations. Every measurement is
a file in RUN/evaluations, so that a second start does only what is missing; the weights are removed once they are measured.
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

from dist_spin.compare.method_variants import learn, method_variant
from dist_spin.compare.plan import FULL, Trial, TrialGroup, at_bits, clips_text, plan_trials, settings_of, work_units
from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.evaluate.fidelity import say_what_is_not_compared, window_figures
from dist_spin.evaluate.perplexity import described, measured_before, measuring_tokens, recorded
from dist_spin.evaluate.tables import comparison_table, row_key
from dist_spin.evaluate.targets import EvalTarget, full_precision
from dist_spin.evaluate.teacher import Teacher
from dist_spin.model.context import check_context
from dist_spin.model.weights import ModelFiles
from dist_spin.optimize.train import train
from dist_spin.pipeline.embeddings import embeddings_of
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import model_dtype, open_configured_model
from dist_spin.pipeline.quant_sites import check_format_groups, clips_at, site_bits, sites_for
from dist_spin.pipeline.stage_context import writing
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.stage import quantize_variants
from dist_spin.runtime.distributed import World, any_rank, on_rank0
from dist_spin.runtime.progress import say, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.locks import Held, Lock
from dist_spin.storage.quantized_layers import embeddings_path, layer_path
from dist_spin.storage.results import merge_results, public, update_results
from dist_spin.storage.rotations import finished_rotations
from dist_spin.storage.run_directory import RunDir, run_dir
from dist_spin.storage.run_records import keep_settings
from dist_spin.storage.tensor_file import read_metadata

HIDDEN_STATES_BYTES = 1 << 33  # of all measurements that go through the layers of a model together


@dataclass
class PreparedTrial:
    """A trial with what it takes to measure it."""

    trial: Trial
    config: RunConfig  # of the trial; its directory is that of its rotations
    target: EvalTarget
    rows: list[dict[str, Any]]  # one for each text, without figures where it was not measured before

    def missing(self) -> list[int]:
        """The indices of the texts that it is still to be measured on."""
        return [i for i, row in enumerate(self.rows) if "ppl" not in row]


Measurement = tuple[PreparedTrial, int]  # of a trial on the text with this index


@dataclass
class Comparison:
    """One process of a comparison."""

    config: RunConfig
    world: World
    files: ModelFiles
    stop: StopRequest
    texts: dict[str, Tensor]  # source -> windows [n, T]
    rows: dict[Trial, list[dict[str, Any]]] = field(default_factory=dict)  # what is measured so far

    @property
    def run(self) -> RunDir:
        """The directory of the run that is compared."""
        return run_dir(self.config)

    @cached_property
    def calibration(self) -> Tensor:
        """The text [n, T] that weights are quantised on."""
        return calibration_tokens(self.config, self.files)

    @cached_property
    def teacher(self) -> Teacher | None:
        """The full-precision model, with which all others are compared; its states of a text are kept once it was read."""
        if not self.config.evaluate.fidelity:
            return None
        target = full_precision(self.config, self.files, self.world.device)
        return Teacher(self.config, self.world, self.files, target, self.stop)

    def complete_units(self, units: dict[str, list[TrialGroup]]) -> dict[str, list[TrialGroup]]:
        """Measure what is missing of units of the plan, one after the other; returns those that other processes are at.

        Raises:
            Interrupted: a signal came.
        """
        others = {}
        for name, groups in units.items():
            with contextlib.ExitStack() as held:
                if self.config.compare.parallel == "rows":
                    try:
                        held.enter_context(Lock(self.run.path / "locks" / f"rows.{name}.lock", f"rows of {name}"))
                    except Held:
                        others[name] = groups
                        continue
                for group in groups:
                    self.complete_group(group)
        return others

    def complete_group(self, group: TrialGroup) -> None:
        """Measure what is missing of a group."""
        by_weights: dict[tuple[str, int, bool], list[PreparedTrial]] = {}
        for prepared in self.prepare(group):
            target = prepared.target  # full precision goes alone: the others are compared with what it leaves
            key = (target.fingerprint, prepared.trial.bits[0], target.full_precision)
            by_weights.setdefault(key, []).append(prepared)
        for trials in by_weights.values():
            self.measure(trials)
            self.record({prepared.trial: [public(row) for row in prepared.rows] for prepared in trials})
            if any_rank(bool(self.stop)):
                done = f"{len(self.rows)} rows of the table are there"
                raise Interrupted(f"stopped by a signal; {done}", "the same command continues")

    def record(self, rows: dict[Trial, list[dict[str, Any]]]) -> None:
        """Remember measured rows, and write them into results.json."""
        self.rows |= rows
        flat_rows = [row for trial_rows in rows.values() for row in trial_rows]
        on_rank0(lambda: merge_results(self.run, "compare", flat_rows, row_key))

    def prepare(self, group: TrialGroup) -> list[PreparedTrial]:
        """The trials of a group, ready to be measured; what they need and is not learned yet is learned first."""
        first = group[0]
        base = settings_of(self.config, first.method, first.seed, first.weights)
        if first.system.learns_rotations:
            self.learn_rotations(base)
        shared_variant = build_variant(base, self.files, first.system.rotation, self.world.device)
        prepared = []
        for trial in group:
            system, weights = trial.system, trial.weights
            config = at_bits(
                settings_of(self.config, trial.method, trial.seed, weights), weights, trial.bits, trial.formats
            )
            if system.is_method:
                variant = self.learn_method(config, trial.method)
            else:
                variant = self.at_sites(shared_variant, config, base)
            target = EvalTarget(variant, weights, full_precision=trial.method == FULL)
            if weights != "none":
                target.fingerprint = layer_fingerprint(config, self.files, variant, self.calibration)
            online = config.rotation.online and variant.rotations is not None
            target.about = {
                "system": system.label + variant.blocks.label,
                "clips": clips_text(config),
                "online": online,
            }
            rows = [described(config, self.files, target, source, tokens) for source, tokens in self.texts.items()]
            rows = [measured_before(self.run, row) or row for row in rows]
            prepared.append(PreparedTrial(trial, config, target, rows))
        return prepared

    def at_sites(self, variant: Variant, config: RunConfig, base: RunConfig) -> Variant:
        """A variant that was learned under `base`, with the sites of `config`."""
        rotated, heads = variant.rotations is not None, bool(variant.sites.heads)
        sites = sites_for(config, self.files.shape, rotated=rotated, heads=heads)
        if (clips := variant.sites.clips) is not None:
            sites = dataclasses.replace(sites, clips=clips_at(config, site_bits(base), clips))
        return dataclasses.replace(variant, sites=sites)

    def learn_method(self, config: RunConfig, method: str) -> Variant:
        """The variant of one of `METHODS` for the bits of `config`; its states are kept in the directory of the run itself."""
        config = dataclasses.replace(config, output_dir=self.config.output_dir, name=self.config.name)
        learn(config, self.world, self.files, method, stop=self.stop)
        return method_variant(config, self.files, method, self.world.device, self.calibration)

    def learn_rotations(self, base: RunConfig) -> None:
        """Learn the rotations of a configuration, unless they are there and whole."""
        if not on_rank0(lambda: finished_rotations(run_dir(base), warn)):
            with writing(base, self.world, "optimize"):
                train(base, self.world, self.stop)
            gc.collect()  # sharded modules are in reference cycles, and what comes next needs their memory

    def measure(self, trials: list[PreparedTrial]) -> None:
        """Measure what is missing of trials that share their weights, and fill it into their rows."""
        missing = [(prepared, i) for prepared in trials for i in prepared.missing()]
        target, seed = trials[0].target, trials[0].trial.seed
        if missing:
            config = trials[0].config if target.weights == "none" else self.quantized(trials[0])
            sources = list(self.texts)
            for batch in self.batches(missing):
                began = time.monotonic()
                weights = "16-bit" if target.weights == "none" else target.weights
                description = f"measure {target.label}, {weights} weights, seed {seed}, {len(batch)} measurements"
                jobs = [(prepared.target.variant.sites, sources[i]) for prepared, i in batch]
                figures = window_figures(
                    config, self.world, self.files, target, jobs, self.texts, description, self.teacher, self.stop
                )
                seconds = (time.monotonic() - began) / len(batch)
                for (prepared, i), measured in zip(batch, figures, strict=True):
                    prepared.rows[i] = recorded(self.run, prepared.rows[i], measured, seconds)
        if target.weights != "none" and not self.config.compare.keep_layers:
            # Also where nothing was missing: a process that was killed after it had measured left its layers.
            layers = run_dir(self.in_own_directory(trials[0])).path
            on_rank0(lambda: shutil.rmtree(layers) if layers.exists() else None)

    def batches(self, measurements: list[Measurement]) -> Iterator[list[Measurement]]:
        """The measurements in lists whose hidden states fit into memory together."""
        lengths = [tokens.numel() for tokens in self.texts.values()]
        token_bytes = self.files.shape.hidden * model_dtype(self.config).itemsize / self.world.size
        batch: list[Measurement] = []
        for measurement in measurements:
            if batch and sum(lengths[i] for _, i in (*batch, measurement)) * token_bytes > HIDDEN_STATES_BYTES:
                yield batch
                batch = []
            batch.append(measurement)
        yield batch

    def in_own_directory(self, prepared: PreparedTrial) -> RunConfig:
        """The configuration of a trial in a directory of its own, for layers that only its rows need."""
        trial, fingerprint = prepared.trial, prepared.target.fingerprint
        name = f"{trial.method}-seed{trial.seed}-{trial.weights}-{fingerprint[:12]}"
        return dataclasses.replace(prepared.config, output_dir=str(self.run.path / "compare"), name=name)

    def quantized(self, prepared: PreparedTrial) -> RunConfig:
        """The configuration of a trial in the directory of its layers: that of the run itself, or one that is filled now."""
        own_run = dataclasses.replace(prepared.config, output_dir=self.config.output_dir, name=self.config.name)
        if on_rank0(lambda: self.layers_finished(own_run, prepared)):
            return own_run
        config = self.in_own_directory(prepared)
        variant = prepared.target.variant
        quantize_variants([QuantizeJob(config, self.world, self.files, variant, self.calibration, self.stop)])
        return config

    def layers_finished(self, config: RunConfig, prepared: PreparedTrial) -> bool:
        """Whether the layers of a trial are in the directory of `config`."""
        variant = prepared.target.variant
        directory = run_dir(config).layers(variant.name)
        paths = [(layer_path(directory, i), prepared.target.fingerprint) for i in range(self.files.shape.layers)]
        embeddings = embeddings_of(config, self.files, variant)
        if embeddings.bits:
            paths.append((embeddings_path(directory), embeddings.fingerprint))
        return all((read_metadata(path) or {}).get("fingerprint") == fingerprint for path, fingerprint in paths)


def compare(config: RunConfig, world: World) -> list[dict[str, Any]]:
    """Measure every trial that is missing, write results.json after each and print the table; returns the rows.

    With `compare.parallel=rows` this is one of several processes, of which the last one to end prints the table.

    Raises:
        Interrupted: a signal came; what was measured or learned is kept.
        UserError: a setting does not fit the model, or a text cannot be read.
    """
    stop, files = StopRequest(), open_configured_model(config)
    if files.shape.experts:
        raise UserError(
            "compare has no place for a mixture of experts", "use quantize.baselines and evaluate", shared=True
        )
    if not config.rotation.r1:
        raise UserError(
            "compare measures systems that turn the residual stream, which rotation.r1=false leaves out",
            "use quantize.baselines and evaluate",
            shared=True,
        )
    check_export_target(config, files.config)
    texts = {source: measuring_tokens(config, files, source) for source in config.evaluate.sources}
    comparison = Comparison(config, world, files, stop, texts)
    plan, run = plan_trials(config), comparison.run
    for trial in plan:
        check_format_groups(at_bits(config, trial.weights, trial.bits, trial.formats), files.shape)
    if any(trial.system.learns_rotations for trial in plan):
        check_context("optimize.seq_len", config.optimize.seq_len, files.config)
    if any(trial.weights != "none" or trial.system.is_method for trial in plan):  # methods learn from that text, too
        check_context("quantize.seq_len", config.quantize.seq_len, files.config)
    on_rank0(lambda: record_start(run, config, len(plan) * len(texts)))
    others = comparison.complete_units(work_units(config, plan))
    if others := comparison.complete_units(others):  # by now other processes may be done or gone
        say(f"other processes are at {', '.join(others)}; the last one to end shows the table")
        return [row for rows in comparison.rows.values() for row in rows]
    rows = [row for trial in plan for row in comparison.rows[trial]]
    on_rank0(lambda: update_results(run, "compare", rows))
    if config.evaluate.fidelity:
        say_what_is_not_compared(run, [row for row in rows if row["system"] != "full precision"])
    if world.is_rank0:
        print(comparison_table(rows))
        say(f"wrote {run.path / 'results.json'}")
    return rows


def record_start(run: RunDir, config: RunConfig, rows: int) -> None:
    """Write what the report tells of a comparison: how many rows it will have, and its settings unless a stage has done so."""
    keep_settings(run.path, config)
    run.event("compare", rows=rows)
