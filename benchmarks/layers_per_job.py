"""What parallelism costs: perplexity of a real model for several `quantize.layers_per_job`, same rotations and data.

    python benchmarks/layers_per_job.py OUT configs/quickstart.yaml --rotations runs/quickstart [key.sub=value ...]

Jobs of few layers can run side by side, but do not see the rounding errors of the layers before them. --rotations takes the
learned rotations of a finished run; without it, random Hadamard rotations. The table is in docs/accuracy.md.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.evaluate.stage import evaluate
from dist_spin.model.rotation import initial
from dist_spin.pipeline.model import open_configured_model
from dist_spin.quantize.stage import quantize
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.rotations import save_final
from dist_spin.storage.run_directory import LEARNED, RunDir


def main() -> None:
    """Run the study and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--rotations", type=Path, help="run directory with finished rotations")
    parser.add_argument("--layers-per-job", type=int, nargs="+", default=[1, 5, 10, 30])
    options = parser.parse_intermixed_args()
    world = start()
    quieten_libraries()
    rows = []
    for per_job in options.layers_per_job:
        words = [f"output_dir={options.out}", f"name=jobs_of_{per_job}", f"quantize.layers_per_job={per_job}"]
        config = load_config(options.config, [*options.settings, *words, "quantize.baselines=[]"])
        run = RunDir(Path(options.out) / config.name)
        final = run.rotations / "final.safetensors"
        if options.rotations:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(options.rotations / "rotations" / "final.safetensors", final)
        elif not final.exists():
            save_final(run, *initial("hadamard", open_configured_model(config).shape, config.rotation.seed), {})
        began = time.monotonic()
        quantize(config, world)
        seconds = time.monotonic() - began
        for row in evaluate(config, world):
            if row["rotation"] == LEARNED and row["weights"] != "none":
                rows.append((per_job, row, seconds, losses(run, row)))
    stop()
    print("| layers_per_job | text | perplexity | nats above the largest | standard error | seconds, one process |")
    print("|---|---|---|---|---|---|")
    for per_job, row, seconds, window_losses in rows:
        reference = next(r[3] for r in reversed(rows) if r[1]["dataset"] == row["dataset"])
        gap = window_losses - reference
        error = float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
        print(
            f"| {per_job} | {row['dataset']} | {row['ppl']:.3f} | {float(gap.mean()):+.4f} | {error:.4f} | {seconds:.0f} |"
        )


def losses(run: RunDir, row: dict[str, object]) -> torch.Tensor:
    """The window losses [n] of a row of the results."""
    for path in (run.path / "evaluations").glob("*.json"):
        measured = json.loads(path.read_text())
        if (measured["ppl"], measured["dataset"], measured["weights"]) == (row["ppl"], row["dataset"], row["weights"]):
            return torch.tensor(measured["losses"], dtype=torch.float64)
    raise LookupError(f"no evaluation of {row} in {run.path}")


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
