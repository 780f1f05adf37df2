"""Number formats: what rotations, rounding and scale search are worth where hardware multiplies in NVFP4, MXFP4 or FP8.

    python benchmarks/formats.py OUT --learn tokens:L.npy#all --texts tokens:A.npy#all tokens:B.npy#all --seeds 0 1 2

Takes the arguments of accuracy.py's study. Every row is a way to rotate and a way to round; rows that share what is learned share
its run. Each is measured with keys and values in 16 bits and in fp8: perplexity and mean divergence from full precision (nats per
token) on every text. --study parts measures instead what each part of our recipes contributes, with 16-bit keys and values.
A rounding that ends in "; tuned" is the one before the semicolon, whose norms (and scales, where they are of 32 bits) then learn
(quantize.tune_steps). Several processes share the device and the rows; no run starts that --minutes may not see through. Rows are
also kept in OUT/rows.jsonl, and `--table` prints the means of what is there.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import queue
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy import ADAM, FIXED, MIXED, SCALES, STRUCTURE, study_parser

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.evaluate.fidelity import window_figures
from dist_spin.evaluate.perplexity import measuring_tokens
from dist_spin.evaluate.targets import EvalTarget, full_precision
from dist_spin.evaluate.teacher import Teacher
from dist_spin.numerics.formats import FORMATS
from dist_spin.optimize.train import train
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.variants import build_variant, calibration_tokens
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.layer_range import quantize_range
from dist_spin.quantize.tune import tune
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import start, stop
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import LEARNED as LEARNED_NAME
from dist_spin.storage.run_directory import run_dir

KV = {
    "16": ["quant.k_bits=16", "quant.v_bits=16"],
    "fp8": ["quant.kv_format=fp8", "quant.k_bits=8", "quant.v_bits=8"],
}
UNLEARNED, OFFLINE = "optimize.steps=0", "rotation.online=false"
STEPS = ["optimize.steps=150", "optimize.batch_size=4", "optimize.guard_every=30", "optimize.guard_sequences=4"]
LEARNED = [*ADAM, *SCALES, *MIXED, *STEPS]
GROUP = {name: number_format.group for name, number_format in FORMATS.items()}

BY_ACTIVATION, PASSES, BOTH = "GPTQ, columns by activation", "GPTQ, passes", "GPTQ, passes, columns by activation"
UNROUNDED = "weights of 16 bits"
ROUNDINGS = {
    PASSES: ["quantize.cd_passes=4", "quantize.clip_norm=2"],
    BOTH: ["quantize.cd_passes=4", "quantize.clip_norm=2", "quantize.act_order=true"],
    BY_ACTIVATION: ["quantize.act_order=true"],
    "GPTQ": [],
    "GPTQ, passes, plain scales": ["quantize.cd_passes=4", "quant.w_mse_clip=false"],
    "GPTQ, passes, no four over six": ["quantize.cd_passes=4", "quantize.clip_norm=2"],
    "RTN, scales searched": ["quantize.method=rtn", "quantize.clip_norm=2"],
    "RTN": ["quantize.method=rtn", "quant.w_mse_clip=false"],
    UNROUNDED: ["quant.w_bits=16"],
}
TUNE = ["quantize.tune_steps=60"]
TUNINGS = {
    "tuned": [*TUNE, "quantize.tune_lr=3e-3"],
    "scales tuned": [*TUNE, "quantize.tune_lr=3e-4"],
}  # the latter for fp8
TUNED, SCALES_TUNED = f"{PASSES}; tuned", f"{PASSES}; scales tuned"


@dataclass(frozen=True)
class Run:
    """One learning (or none) in one format, and the ways its result is rounded and measured."""

    name: str
    format: str
    settings: list[str]
    roundings: list[str]
    caches: list[str] = field(default_factory=lambda: list(KV))
    seed: int = 0

    @property
    def unrotated(self) -> bool:
        """Whether it measures the network as it is."""
        return self.name.startswith("no rotation")


def main_runs(name: str) -> Iterator[Run]:
    """The rows that are compared in the format `name`."""
    plain = ["RTN", "GPTQ", PASSES]
    if name == "fp8":
        alone = [OFFLINE, UNLEARNED, "quant.a_bits=16"]
        yield Run("no rotation", name, [OFFLINE, UNLEARNED], [*plain, SCALES_TUNED, UNROUNDED])
        yield Run("no rotation, 16-bit activations", name, alone, [*plain, SCALES_TUNED, UNROUNDED])
        yield Run("global Hadamard, int8", name, [UNLEARNED, "quant.w_format=int", "quant.a_format=int"], [PASSES])
        return
    blocks = f"rotation.block={GROUP[name]}"
    yield Run("no rotation", name, [OFFLINE, UNLEARNED], plain)
    yield Run("ours", name, OURS[name], [PASSES, BOTH])
    yield Run(f"Hadamard in blocks of {GROUP[name]}", name, [blocks, UNLEARNED], ["GPTQ", BY_ACTIVATION, BOTH])
    yield Run(f"Hadamard in blocks of {GROUP[name]}, no R4", name, [blocks, UNLEARNED, OFFLINE], [BOTH])
    yield Run("global Hadamard", name, [UNLEARNED], ["GPTQ"])
    yield Run("whole R1, learned", name, [*ADAM, *STEPS], ["GPTQ"])


OURS = {  # configs/serve has the same, but for MXFP4, where nothing is learned and R4 is left out
    "nvfp4": [*LEARNED, "rotation.block=16", "rotation.init=identity", OFFLINE],
    "mxfp4": [*LEARNED, "rotation.block=32", "rotation.init=hadamard", "optimize.lr=0.002", "optimize.scale_lr=0.01"],
}


def parts_runs(name: str) -> Iterator[Run]:
    """Our recipe in the format `name` with one thing changed at a time."""
    if name not in OURS:
        return
    recipe, caches = OURS[name], ["16"]

    def changed(what: str, *settings: str) -> Run:
        return Run(f"ours, {what}", name, [*recipe, *settings], [BOTH], caches)

    def unlearned(what: str, *settings: str) -> Run:
        return Run(f"unlearned, {what}", name, [UNLEARNED, *settings], [BOTH], caches)

    yield Run("ours", name, recipe, [*ROUNDINGS, TUNED], caches)
    for size in (16, 32, 64, 192, 0):  # 128 divides neither 576 nor what SmolLM2's heads make
        yield unlearned(f"Hadamard in blocks of {size}" if size else "global Hadamard", f"rotation.block={size}")
    yield changed("no scales", "optimize.scales=false")
    yield changed("R fixed", FIXED)
    yield changed("cross entropy", "optimize.objective=cross_entropy")
    yield changed("KL", "optimize.objective=kl")
    yield changed("from no rotation, R4 online", "rotation.init=identity", "rotation.online=true")
    yield changed("from a Hadamard, R4 online", "rotation.init=hadamard", "rotation.online=true")
    yield changed("from a Hadamard", "rotation.init=hadamard", OFFLINE)
    yield changed("from random blocks", "rotation.init=orthogonal")
    for size in (16, 32, 64, 192):
        yield changed(f"blocks of {size}", f"rotation.block={size}")
    yield changed("whole R1", "rotation.block=0")


class Measuring:
    """What the runs of one process share: its device, the texts, and what the full-precision model makes of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.world = options, start(threads=options.threads)
        self.structure: list[Any] = []
        config = self.config("full precision", "int", 0, ["quant.a_bits=16", "quant.w_bits=16"])
        self.files = open_configured_model(config)
        self.texts = {source: measuring_tokens(config, self.files, source) for source in options.texts}
        self.target = full_precision(config, self.files, self.world.device)
        self.teacher = Teacher(config, self.world, self.files, self.target, None)
        jobs = [(self.target.variant.sites, source) for source in self.texts]
        found = window_figures(config, self.world, self.files, self.target, jobs, self.texts, "measure", self.teacher)
        self.full = [math.exp(float(figures.losses.mean())) for figures in found]

    def config(self, name: str, kind: str, seed: int, settings: list[str]) -> RunConfig:
        """The configuration of a run in the format `kind`."""
        bits = FORMATS[kind].bits if kind in FORMATS else 16
        words = [
            f"output_dir={self.options.out}",
            f"name={name.replace(' ', '-').replace(',', '')}-{kind}-{seed}",
            f"model.path={self.options.model}",
            f"rotation.seed={seed}",
            f"optimize.seed={seed}",
            f"quantize.seed={seed}",
            f"optimize.source={self.options.learn}",
            f"quantize.source={self.options.learn}",
            f"evaluate.sources=[{','.join(self.options.texts)}]",
            "evaluate.split=all",
            f"quant.w_format={kind}",
            f"quant.a_format={kind}",
            f"quant.w_bits={bits}",
            f"quant.a_bits={bits}",
        ]
        return load_config(None, [*words, *KV["16"], *settings, *self.options.settings])

    def make_room_for_graphs(self, config: RunConfig) -> None:
        """Forget compiled graphs where those of `config` differ: so many kinds of graphs would meet the recompile limit."""
        structure = [getattr(config.optimize, name) for name in STRUCTURE] + [config.quant, config.rotation.online]
        structure.append(config.rotation.block)
        if structure != self.structure:
            torch._dynamo.reset()
        self.structure = structure

    def measured(self, run: Run, rounding: str) -> list[tuple[float, float]]:
        """Perplexity and divergence of what was learned, rounded one way, for each cache and text."""
        plain, _, tuning = rounding.partition("; ")
        config = self.config(run.name, run.format, run.seed, [*run.settings, *ROUNDINGS[plain]])
        rotation, layers = "none" if run.unrotated else LEARNED_NAME, self.files.shape.layers
        variant = build_variant(config, self.files, rotation, self.world.device)
        if plain == UNROUNDED:
            return self.figures(run, config, EvalTarget(variant, "none"))
        variant = dataclasses.replace(variant, name=plain.replace(" ", "-").replace(",", ""))
        tokens = calibration_tokens(config, self.files)
        job = QuantizeJob(config, self.world, self.files, variant, tokens, StopRequest())
        quantize_range(job, 0, layers)  # what was rounded so before is there still
        if tuning:
            rounded, variant = job, dataclasses.replace(variant, name=LEARNED_NAME)  # no other is tuned
            words = [*run.settings, *ROUNDINGS[plain], *TUNINGS[tuning]]
            config = self.config(run.name, run.format, run.seed, words)
            job = QuantizeJob(config, self.world, self.files, variant, tokens, StopRequest())
            job.make_embeddings()
            tune(job, rounded)
        return self.figures(run, config, EvalTarget(variant, config.quantize.method, fingerprint=job.fingerprint))

    def figures(self, run: Run, config: RunConfig, target: EvalTarget) -> list[tuple[float, float]]:
        """Perplexity and divergence of `target` for each cache and text of the run."""
        jobs = []
        for cache in run.caches:
            cached = self.config(run.name, run.format, run.seed, [*run.settings, *KV[cache]])
            sites = sites_for(cached, self.files.shape, rotated=not run.unrotated)
            jobs += [(sites, source) for source in self.texts]
        found = window_figures(config, self.world, self.files, target, jobs, self.texts, "measure", self.teacher)
        return [(math.exp(float(figures.losses.mean())), figures.fidelity["kl"]) for figures in found]


def run_once(here: Measuring, run: Run) -> Iterator[dict[str, Any]]:
    """Learn, then round and measure in every way that the run asks for; yields a record for each text."""
    began, factors = time.monotonic(), FORMATS[run.format].factors
    config = here.config(run.name, run.format, run.seed, run.settings)
    directory = run_dir(config).path
    directory.mkdir(parents=True, exist_ok=True)
    if config.optimize.steps:
        here.make_room_for_graphs(config)
        train(config, here.world)
    learning = time.monotonic() - began
    texts = list(here.texts)
    for source, ppl in zip(texts, here.full, strict=True):
        yield record("", "", "full precision", "", run.seed, source, ppl, 0.0, 0.0, 0.0)
    for rounding in run.roundings:
        tried = tuple(f for f in factors if f != FOUR_OVER_SIX) if "no four over six" in rounding else factors
        FORMATS[run.format] = dataclasses.replace(FORMATS[run.format], factors=tried)
        figures = here.measured(run, rounding)
        FORMATS[run.format] = dataclasses.replace(FORMATS[run.format], factors=factors)
        seconds = time.monotonic() - began
        places = [(cache, source) for cache in run.caches for source in texts]
        for (cache, source), found in zip(places, figures, strict=True):
            yield record(run.format, cache, run.name, rounding, run.seed, source, *found, learning, seconds)
    shutil.rmtree(directory)


def record(
    kind: str, kv: str, run: str, rounding: str, seed: int, text: str, ppl: float, kl: float, learning: float, s: float
) -> dict[str, Any]:
    """What is kept of one measurement."""
    names = ("format", "kv", "run", "rounding", "seed", "text", "ppl", "kl", "learning_s", "in_all_s")
    return dict(zip(names, (kind, kv, run, rounding, seed, text, ppl, kl, round(learning), round(s)), strict=True))


FOUR_OVER_SIX = 1.5  # NVFP4's factor of that name; the others that are searched are clips


def work(options: argparse.Namespace, runs: Any, records: Any, do: Callable[..., Iterator[dict[str, Any]]]) -> None:
    """A process: take runs until there are none, or no time, and hand their records on."""
    quieten_libraries()
    here = Measuring(options)
    while time.time() < options.last_start:
        try:
            run = runs.get(timeout=1)
        except queue.Empty:
            break
        try:
            for found in do(here, run):
                records.put(found)
        except Exception:  # the other rows are worth having all the same
            records.put({"failed": f"{run.name}, {run.format}, seed {run.seed}", "why": traceback.format_exc()})
    stop()
    records.put(None)


def study(options: argparse.Namespace, runs: list[Run], do: Callable[..., Iterator[dict[str, Any]]] = run_once) -> None:
    """Share the runs out over processes; print rows and keep them as they come."""
    options.out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    waiting, records = spawn.Queue(), spawn.Queue()
    for run in runs:
        waiting.put(run)
    end = time.time() + 60 * options.minutes
    options.last_start = end - options.reserve
    processes = [
        spawn.Process(target=work, args=(options, waiting, records, do), daemon=True) for _ in range(options.processes)
    ]
    for process in processes:
        process.start()
    print("format | KV | rotation | rounding | seed | " + " | ".join(options.texts) + " | learning s | in all s")
    left, cells = len(processes), {}
    with (options.out / "rows.jsonl").open("a") as file:
        while left and time.time() < end:
            try:
                record = records.get(timeout=1)
            except queue.Empty:
                left -= sum(process.exitcode not in (None, 0) for process in processes) == left
                continue
            if record is None:
                left -= 1
                continue
            print(json.dumps(record), file=file, flush=True)
            if "failed" in record:
                print(record["failed"], record["why"], file=sys.stderr, flush=True)
                continue
            row = tuple(record[name] for name in ("format", "kv", "run", "rounding", "seed"))
            cells.setdefault(row, []).append(f"{record['ppl']:.3f} {record['kl']:.4f}")
            if len(cells[row]) == len(options.texts):
                times = f"{record['learning_s']} | {record['in_all_s']}"
                print(" | ".join(map(str, row)), *cells.pop(row), times, sep=" | ", flush=True)
    for process in processes:
        process.terminate()
    waiting.cancel_join_thread()  # what was not begun is not waited for


def print_table(path: Path) -> None:
    """Means over seeds of the rows that were kept, and how much of the loss that RTN adds each of them takes back."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
    for r in records:
        if "failed" not in r:
            texts = found.setdefault((r["format"], r["kv"], r["run"], r["rounding"]), {})
            texts.setdefault(r["text"], []).append((r["ppl"], r["kl"]))
    means = {row: [mean_of(cells) for cells in texts.values()] for row, texts in found.items()}
    full = means[("", "", "full precision", "")]
    print(
        "| format | KV | rotation | rounding | perplexity | divergence | gap closed | seeds |\n|---|---|---|---|---|---|---|---|"
    )
    for row, cells in sorted(means.items()):
        worst = means.get((row[0], row[1], "no rotation", "RTN"))
        closed = ""
        if worst and len(worst) == len(cells):
            shares = [(w[0] - c[0]) / (w[0] - f[0]) for w, c, f in zip(worst, cells, full, strict=True)]
            closed = " ".join(f"{100 * share:.0f}" for share in shares) + " %"
        figures = " ".join(f"{ppl:.2f}" for ppl, _ in cells), " ".join(f"{kl:.3f}" for _, kl in cells)
        seeds = min(len(cells) for cells in found[row].values())
        print("|", " | ".join([*row, *figures, closed, str(seeds)]), "|")


def mean_of(cells: list[tuple[float, float]]) -> tuple[float, float]:
    """Means of perplexities and divergences."""
    return statistics.mean(c[0] for c in cells), statistics.mean(c[1] for c in cells)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = study_parser(seeds=[0, 1, 2])
    out.add_argument("--formats", nargs="+", default=["nvfp4", "mxfp4", "fp8"], choices=list(GROUP))
    out.add_argument(
        "--study", choices=["rows", "parts"], default="rows", help="what is measured (default: %(default)s)"
    )
    out.add_argument("--processes", type=int, default=4, help="runs at a time (default: %(default)s)")
    out.add_argument("--threads", type=int, default=3, help="CPU threads of each (default: %(default)s)")
    out.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    out.add_argument("--reserve", type=float, default=0, metavar="S", help="start no run in the last S seconds")
    out.add_argument("--table", action="store_true", help="print the means of OUT/rows.jsonl, and run nothing")
    return out


def main() -> None:
    """Run the study."""
    options = parser().parse_intermixed_args()
    if options.table:
        print_table(options.out / "rows.jsonl")
        return
    make = {"rows": main_runs, "parts": parts_runs}[options.study]
    of_seed = [
        dataclasses.replace(run, seed=seed) for seed in options.seeds for name in options.formats for run in make(name)
    ]
    study(options, of_seed)


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
