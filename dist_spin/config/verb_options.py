"""The options of each verb of the command line, besides settings."""

import argparse
import contextlib
import math
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

from dist_spin.config.checks import shown
from dist_spin.config.command_parser import Parser
from dist_spin.config.export import FORMATS

DIGITS = 9  # of numbers on the command line


def _count(text: str) -> int:
    if not (text.isdecimal() and 0 < len(text) <= DIGITS and int(text)):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number from 1 on")
    return int(text)


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _amount(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{shown(text)} is no number above 0")


def _layers(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    numbers = start.isdecimal() and stop.isdecimal() and max(len(start), len(stop)) <= DIGITS
    if not (numbers and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not A:B, which means layers A to B-1, such as 0:10")
    return int(start), int(stop)


def run_options(parser: Parser) -> None:
    """The run directory, of every verb that looks at a run."""
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's directory")


def scheduler_options(parser: Parser) -> None:
    """What is handed on to Slurm."""
    meaning = "a setting of sbatch, such as partition=gpu; may be given several times"
    parser.add_argument("--slurm", metavar="key=value", action="append", default=[], help=meaning)


def quantize_options(parser: Parser) -> None:
    """Of `dist-spin quantize`."""
    parser.add_argument(
        "--layers",
        metavar="A:B",
        type=_layers,
        help="only layers A to B-1, one or more whole jobs (quantize.layers_per_job)",
    )
    meaning = "only store the hidden states that later ranges of layers start from"
    parser.add_argument("--hidden-states", action="store_true", help=meaning)
    parser.add_argument("--boundaries", dest="hidden_states", action="store_true", help=SUPPRESS)  # its name of old
    clusters = ("local", "slurm", "submitit-local", "debug")
    parser.add_argument("--cluster", choices=clusters, help="run all jobs in parallel: on this machine, or by submitit")
    parser.add_argument("--workers", metavar="N", type=_count, help="jobs at a time; default: one per GPU or core")
    meaning = "how often a job may fail in a row without finishing a layer (default: 3)"
    parser.add_argument("--retries", metavar="N", type=_count_or_zero, help=meaning)
    scheduler_options(parser)


def export_options(parser: Parser) -> None:
    """Of `dist-spin export`."""
    parser.add_argument("--format", metavar="|".join(FORMATS), help="default: export.target")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: export/FORMAT in the run's directory")


def serve_check_options(parser: Parser) -> None:
    """Of `dist-spin serve-check`."""
    parser.add_argument("paths", metavar="EXPORT", type=Path, nargs="+", help="directories that `export` wrote")
    parser.add_argument("--engine", choices=("vllm",), default="vllm", help="which engine (default: vllm)")
    meaning = "of the engine's environment; default: this one, or the one of the vllm program on PATH"
    parser.add_argument("--python", metavar="PATH", type=Path, help=meaning)
    meaning = "what is read, as evaluate.sources; its test part (default: pydoc)"
    parser.add_argument("--text", metavar="SOURCE", help=meaning)
    parser.add_argument("--sequences", metavar="N", type=_count, help="windows of it (default: 8)")
    parser.add_argument("--seq-len", metavar="N", type=_count, help="tokens of a window (default: 128)")
    parser.add_argument("--tokens", metavar="N", type=_count, help="tokens written after half a window (default: 16)")
    parser.add_argument("--tensor-parallel", metavar="N", type=_count, help="GPUs of the engine (default: 1)")
    parser.add_argument("--kv-cache-dtype", metavar="DTYPE", help="as the engine's own option (default: auto)")
    meaning = "on a CPU: let the engine compute NVFP4 by its emulation, which it takes on GPUs alone"
    parser.add_argument("--emulate", action="store_true", help=meaning)
    parser.add_argument("--json", dest="as_json", action="store_true", help="the same as JSON, for programs")


def submit_options(parser: Parser) -> None:
    """Of `dist-spin submit`."""
    meaning = "slurm, or this machine in the background (local) or in this process (debug)"
    parser.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help=meaning)
    scheduler_options(parser)


def report_options(parser: Parser) -> None:
    """Of `dist-spin report`."""
    meaning = "where the page of several runs goes; default: side-by-side.html beside the first of them"
    parser.add_argument("-o", dest="output", metavar="FILE.html", type=Path, help=meaning)


def plot_options(parser: Parser) -> None:
    """Of `dist-spin plot`."""
    run_options(parser)
    parser.add_argument("name", metavar="FIGURE", nargs="?", help="name of a figure; default: list them")
    parser.add_argument("-o", dest="target", metavar="FILE", help="FILE.png or FILE.svg; default: FIGURE.png")
    parser.add_argument("--dark", dest="theme", action="store_const", const="dark", help="light text on black, for PNG")


def generate_options(parser: Parser) -> None:
    """Of `dist-spin generate`."""
    run_options(parser)
    parser.add_argument("prompt", metavar="TEXT", nargs="?", help="what both models continue")
    parser.add_argument("--tokens", metavar="N", type=_count, help="tokens of an answer (default: 64)")


def chat_options(parser: Parser) -> None:
    """Of `dist-spin chat`."""
    run_options(parser)
    parser.add_argument("--tokens", metavar="N", type=_count, help="tokens of an answer (default: 256)")


def status_options(parser: Parser) -> None:
    """Of `dist-spin status`."""
    run_options(parser)
    parser.add_argument("--json", dest="as_json", action="store_true", help="the same as JSON, for programs")
    parser.add_argument(
        "--watch", dest="watching", action="store_true", help="repeat until the run is complete or has stopped"
    )


def init_options(parser: Parser) -> None:
    """Of `dist-spin init`."""
    parser.add_argument("file", metavar="FILE.yaml", nargs="?", type=Path, help="default: the run's name and .yaml")
    parser.add_argument("--model", metavar="MODEL", help="a hub id, directory, .gguf file or package:NAME")
    parser.add_argument("--gpus", metavar="N", type=_count_or_zero, help="GPUs of this machine to use; 0: the CPU")
    parser.add_argument("--target", metavar="|".join(("none", *FORMATS)), help="what the model is to be exported to")
    parser.add_argument("--example", metavar="NAME", help="copy an example, such as quickstart, llama-3.1-70b or slurm")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def plan_options(parser: Parser) -> None:
    """Of `dist-spin plan`."""
    parser.add_argument(
        "--gpus", metavar="N", type=_count, default=0, help="of one host; default: those of this machine"
    )
    parser.add_argument(
        "--gpu", dest="kind", choices=("h100", "h200"), default="", help="default: this machine's, or h200"
    )
    amount: dict[str, Any] = {"metavar": "GIB", "type": _amount, "default": 0.0}
    parser.add_argument("--gpu-memory", help="of one GPU; default: all that its kind has", **amount)
    meaning = "default: what is free on this machine, or 512 where it has no GPU"
    parser.add_argument("--host-memory", help=meaning, **amount)
    meaning = "GB/s at which files are written (default: %(default)s)"
    parser.add_argument("--disk-gb-s", dest="disk", metavar="X", type=_amount, default=2.0, help=meaning)
    parser.add_argument("--json", dest="as_json", action="store_true", help="the same as JSON, for programs")
