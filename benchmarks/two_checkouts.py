"""Speed of two checkouts side by side on one machine: learning and GPTQ, by their own `bench` verbs, in turns.

    python benchmarks/two_checkouts.py OLD NEW --optimize configs/shapes/llama-3-8b --quantize 8b --rounds 2

Each round runs OLD then NEW, the next one NEW then OLD, so that what drifts on the machine meets both. The last lines are the
ratios NEW / OLD of the fastest times: a step of learning, its forward and backward passes, and GPTQ of one layer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIMIZE = ("step_s", "forward_backward_s")
QUANTIZE = ("quantize_layer_s",)


def bench(checkout: Path, words: list[str], out: Path) -> dict[str, float]:
    """Run `dist-spin bench …` of a checkout; the figures that it writes to `out`."""
    began = time.monotonic()
    command = [sys.executable, "-m", "dist_spin", "bench", *words, str(out)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {checkout} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    print(f"{checkout.name}: bench {' '.join(words[:2])} took {time.monotonic() - began:.0f} s", flush=True)
    figures = json.loads(out.read_text())
    if "runs" in figures:  # of `bench quantize`
        return {"quantize_layer_s": min(run["layer"] for run in figures["runs"])}
    return {name: figures[name] for name in OPTIMIZE}


def main() -> None:
    """Print every measurement and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--optimize", default="configs/shapes/llama-3-8b", help="shape of `bench optimize`; '' leaves it out"
    )
    parser.add_argument(
        "--settings", default="optimize.batch_size=8", help="more words for `bench optimize`, quoted as one"
    )
    parser.add_argument("--quantize", default="8b", help="shape of `bench quantize`; '' leaves it out")
    parser.add_argument("--quantize-words", default="", help="more words for `bench quantize`, quoted as one")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    benches = []
    if options.optimize:
        shape = str(Path(options.optimize).resolve())
        benches.append((OPTIMIZE, ["optimize", shape, *options.settings.split(), "--json"]))
    if options.quantize:
        benches.append((QUANTIZE, ["quantize", "--shape", options.quantize, *options.quantize_words.split(), "--out"]))
    best: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for which in ("old", "new") if turn % 2 == 0 else ("new", "old"):
                for names, words in benches:
                    figures = bench(getattr(options, which).resolve(), words, Path(folder) / "figures.json")
                    for name in names:
                        print(f"  {which} {name} {figures[name]:.5f}", flush=True)
                        best[which, name] = min(best.get((which, name), float("inf")), figures[name])
    for names, _ in benches:
        for name in names:
            old, new = best["old", name], best["new", name]
            print(f"{name}: old {old:.5f}  new {new:.5f}  ratio {new / old:.4f}")


if __name__ == "__main__":
    main()
