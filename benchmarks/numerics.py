"""Whether the fast path learns as well as exact arithmetic: bf16 and compiled layers beside fp32 and eager ones.

    python benchmarks/numerics.py OUT [key=value ...] --model PATH --learn tokens:L.npy#all --texts tokens:A.npy#all --seeds 0 1

Both learn R from the same start and data; both rotations are then measured in the same way, in bf16 with 16-bit weights.
"""

import math
import statistics
import sys

import torch
from accuracy import study_parser

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.evaluate.stage import evaluate
from dist_spin.optimize.train import train
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.run_directory import run_dir

PATHS = {
    "fast": ["model.dtype=bfloat16", "optimize.compile=on"],
    "exact": ["model.dtype=float32", "optimize.compile=off"],
}


def main() -> None:
    """Run the study."""
    options = study_parser(seeds=[0, 1, 2]).parse_intermixed_args()
    world = start()
    quieten_libraries()
    print("path | seed | " + " | ".join(options.texts))
    perplexities: dict[str, list[list[float]]] = {name: [] for name in PATHS}
    for seed in options.seeds:
        for name, how in PATHS.items():
            torch._dynamo.reset()
            words = [f"output_dir={options.out}", f"model.path={options.model}", f"rotation.seed={seed}"]
            words += [f"optimize.source={options.learn}", f"optimize.seed={seed}", *options.settings]
            learned = load_config(None, [*words, f"name={name}-{seed}", *how])
            final = run_dir(learned).rotations / "final.safetensors"
            if not final.exists():
                train(learned, world)
            measured = [f"name={name}-{seed}-measured", f"rotation.load={final}", "optimize.steps=0"]
            measured += [f"evaluate.sources=[{','.join(options.texts)}]", "evaluate.split=all"]
            measured += ["quantize.method=none", "evaluate.unquantized_weights=true"]
            rows = evaluate(load_config(None, [*words, *measured]), world)
            ppl = [row["ppl"] for row in rows if row["a_bits"] < 16]
            perplexities[name].append(ppl)
            print(f"{name} | {seed} | " + " | ".join(f"{p:.3f}" for p in ppl), flush=True)
    for text, fast, exact in zip(
        options.texts, zip(*perplexities["fast"], strict=True), zip(*perplexities["exact"], strict=True), strict=True
    ):
        ratio = math.exp(statistics.mean(math.log(f / e) for f, e in zip(fast, exact, strict=True)))
        print(f"{text}: fast / exact {ratio:.4f} (geometric mean of {len(fast)} seeds)")
    stop()


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
