"""A model beside SmolLM2 on which a recipe must hold: every row of one table, by `compare`, under the bits that people deploy.

    python benchmarks/second_model.py OUT --model PATH --learn text:LEARN.txt#all --texts text:PROSE.txt#all text:CODE.txt#all

PATH: a model directory or a .gguf file, whose dequantised weights are then called full precision. Rows: rounding to nearest
without rotations, a random Hadamard, SpinQuant's recipe and `configs/accurate.yaml`, which learn from --learn for equally long;
where activations have 8 or 16 bits also what that file says to learn there. All but the first are rounded by GPTQ, and all
share quantisers. Prints perplexity, KL divergence from full precision (nats per token) and how often the most probable
token is the same (%). What is measured in OUT is not measured again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from dist_spin.cli import report_mistakes
from dist_spin.compare.stage import compare
from dist_spin.config.loader import load_config
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.results import FIDELITY, PERPLEXITY, bits_label, results
from dist_spin.storage.run_directory import run_dir

RECIPE = Path(__file__).parents[1] / "configs" / "accurate.yaml"
FEW, WIDE = ["W4A4KV4"], ["W4A8KV4", "W4A16"]
WIDE_RECIPE = [
    "rotation.init=hadamard",
    "optimize.scales=false",
    "optimize.clips=false",
]  # as configs/accurate.yaml says
SHOWN = [figure for figure in (PERPLEXITY, *FIDELITY) if figure.name != "kl_p99"]
ALONE = "ours, R alone from a Hadamard"
NAMES = {
    "RTN": "no rotation, RTN",
    "random Hadamard": "random Hadamard, GPTQ",
    "SpinQuant (had)": "SpinQuant's recipe, GPTQ",
}


def main() -> None:
    """Run both comparisons and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", metavar="OUT", type=Path, help="directory for the runs")
    parser.add_argument("--model", required=True, help="as model.path: a directory or a .gguf file")
    parser.add_argument("--learn", metavar="SOURCE", required=True, help="text to learn from and to calibrate on")
    parser.add_argument("--texts", metavar="SOURCE", nargs="+", required=True, help="texts to measure on")
    meaning = "as compare.methods (default: %(default)s)"
    parser.add_argument("--methods", default="rtn,hadamard,spinquant_had,ours", help=meaning)
    parser.add_argument("settings", metavar="key.sub=value", nargs="*", help="further settings of every row")
    options = parser.parse_intermixed_args()
    common = [f"output_dir={options.out}", f"model.path={options.model}", "compare.weights=[gptq]", "compare.seeds=[0]"]
    common += [f"optimize.source={options.learn}", f"quantize.source={options.learn}"]
    common += [f"evaluate.sources=[{','.join(options.texts)}]", "evaluate.split=all", *options.settings]
    few = load_config(str(RECIPE), ["name=few", f"compare.methods=[{options.methods}]", bits(FEW + WIDE), *common])
    wide = load_config(str(RECIPE), ["name=wide", "compare.methods=[ours]", bits(WIDE), *WIDE_RECIPE, *common])
    world = start()
    quieten_libraries()
    compare(few, world)
    if "ours" in options.methods.split(","):
        torch._dynamo.reset()  # the networks differ
        compare(wide, world)
    stop()
    # What other processes have measured (compare.parallel=rows) stands in the files alone.
    rows = results(run_dir(few), "compare")
    alone = [row | {"system": ALONE} for row in results(run_dir(wide), "compare") if row["system"] == "ours"]
    print("\n".join(table([*rows, *alone], options.texts)))


def bits(columns: list[str]) -> str:
    """The setting that names the columns of a comparison."""
    return f"compare.bits=[{','.join(columns)}]"


def table(rows: list[dict[str, Any]], texts: list[str]) -> list[str]:
    """Markdown: a line for each system, of each bits and text the figures of `SHOWN`, "–" where it was not measured."""
    columns = [(name, text) for name in (*FEW, *WIDE) for text in texts]
    values = {(row["system"], bits_label(row), row["dataset"]): row for row in rows}
    full = [row for row in rows if row["system"] == "full precision"]
    lines = [
        "Full precision: " + ", ".join(f"{short(row['dataset'])} {PERPLEXITY.text(row['ppl'])}" for row in full),
        "",
    ]
    heads = ["", *(f"{name}, {short(text)}" for name, text in columns)]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for system in dict.fromkeys(row["system"] for row in rows if row["system"] != "full precision"):
        found = [values.get((system, column_of(name), text)) for name, text in columns]
        cells = ["–" if r is None else " / ".join(figure.text(r[figure.name]) for figure in SHOWN) for r in found]
        lines.append(f"| {NAMES.get(system, system)} | {' | '.join(cells)} |")
    return [*lines, "", f"Each: {' / '.join(figure.head for figure in SHOWN)}."]


def short(text: str) -> str:
    """A source by the name of its file."""
    return text.rpartition("/")[2].partition(".")[0]


def column_of(name: str) -> str:
    """A name of `FEW` or `WIDE` as `bits_label` has it, which spells out 16 bits of keys and values."""
    return name if "KV" in name else f"{name}KV16"


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
