"""What is learned against a random Hadamard on a real model, over seeds: paired per window, with standard errors.

    python benchmarks/seeds.py OUT configs/quickstart.yaml --seeds 0 1 2 [--weights gptq] [key.sub=value ...]

Prints perplexities of W16A4KV4 (and of quantised weights with --weights) for the random Hadamard and what is learned, and
the mean difference of the windows' losses with its standard error. Those of docs/accuracy.md are of the published recipe:
rotation.init=hadamard optimize.optimizer=cayley_sgd optimize.lr=1.5 optimize.warmup_steps=0 optimize.scales=false
optimize.clips=false optimize.steps=12 optimize.batch_size=4 quantize.clip_norm=2.4 quantize.cd_passes=0
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.evaluate.stage import evaluate
from dist_spin.optimize.train import train
from dist_spin.quantize.stage import quantize
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import start, stop

Losses = dict[tuple[str, str], list[torch.Tensor]]


def add_losses(losses_of: Losses, run: Path) -> None:
    """Add the window losses [n] of a run's measurements, by rotation ("full" where activations have 16 bits) and weights."""
    for path in sorted((run / "evaluations").glob("*.json")):
        row = json.loads(path.read_text())
        key = ("full" if row["a_bits"] == 16 else row["rotation"], row["weights"])
        losses_of.setdefault(key, []).append(torch.tensor(row["losses"], dtype=torch.float64))


def difference(losses: list[torch.Tensor], others: list[torch.Tensor]) -> str:
    """What losses [n] of some seeds are above those of others, mean over seeds with the standard error over windows."""
    pairs = [a - b for a, b in zip(losses, others, strict=True)]
    gap = torch.stack(pairs).mean(0)  # [windows]
    by_seed = " ".join(f"{pair.mean():.4f}" for pair in pairs)
    return f"{gap.mean():.4f} ± {gap.std() / math.sqrt(len(gap)):.4f} nats; by seed {by_seed}"


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", choices=["none", "gptq", "rtn"], default="none")
    parser.add_argument("--unrotated", action="store_true", help="also the unrotated baseline, at the first seed")
    options = parser.parse_intermixed_args()
    world = start()
    quieten_libraries()
    losses_of: Losses = {}
    for seed in options.seeds:
        baselines = "[none, hadamard]" if options.unrotated and seed == options.seeds[0] else "[hadamard]"
        words = [
            f"output_dir={options.out}",
            f"name=seed{seed}",
            f"rotation.seed={seed}",
            f"optimize.seed={seed}",
            f"quantize.seed={seed}",
            f"quantize.method={options.weights}",
            f"quantize.baselines={baselines}",
            "evaluate.unquantized_weights=true",
        ]
        config = load_config(options.config, [*options.settings, *words])
        train(config, world)
        quantize(config, world)
        evaluate(config, world)
        add_losses(losses_of, Path(options.out) / f"seed{seed}")
    stop()
    for key, losses in sorted(losses_of.items()):
        print(key, "ppl per seed:", " ".join(f"{math.exp(x.mean()):.3f}" for x in losses))
    for weights in sorted({w for _, w in losses_of}):
        if ("learned", weights) in losses_of and ("hadamard", weights) in losses_of:
            gain = difference(losses_of["learned", weights], losses_of["hadamard", weights])
            print(f"{weights} weights: learned - Hadamard = {gain}")


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
