"""The command line: a verb, its options, and settings of the run; nothing is computed here.

dist-spin run configs/quickstart.yaml optimize.steps=20
torchrun --nproc_per_node 2 -m dist_spin optimize configs/quickstart.yaml

Everything that a verb needs is imported when it is used, so that help and mistakes answer at once.
"""

import importlib
import os
import shlex
import sys
import typing
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_spin import command
from dist_spin.config import verb_options
from dist_spin.config.command_parser import HelpAll, Parser, every_verb
from dist_spin.config.export import FORMATS
from dist_spin.config.help import settings_help
from dist_spin.config.run import LOCATION, RunConfig
from dist_spin.config.suggestions import closest, did_you_mean
from dist_spin.config.yaml_text import YAML_ENDINGS
from dist_spin.errors import EXIT_OK, EXIT_PIPE, RankLost, UserError, out_of_memory
from dist_spin.runtime.console import Console, shown_on
from dist_spin.version import __version__


@dataclass(frozen=True)
class Verb:
    """What a verb does, the function that does it, and what it takes from the command line."""

    what: str
    function: str  # "module:function", imported when the verb is used
    call: Callable[[command.Command], int]  # how that function is called
    options: Callable[[Parser], object] = lambda parser: None
    reads: tuple[str, ...] = ()  # groups of settings, and single ones of other groups as `group.name`
    takes: str = ""  # what follows the verb, where it is no option
    example: str = ""  # what follows the verb in the example of its help


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (see `dist_spin.errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = report_mistakes(lambda: _run_verb(words))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still in the buffers goes nowhere, or the interpreter would complain of it on its way out.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        return EXIT_PIPE


def report_mistakes(run: Callable[[], int | None]) -> int:
    """Call `run`; a user's mistake becomes one line on standard error. Returns the exit code (see `dist_spin.errors`)."""
    try:
        return run() or EXIT_OK
    except SystemExit as left:  # argparse, once it has printed help
        return int(left.code or 0)
    except Exception as error:
        mistake = error if isinstance(error, UserError) else out_of_memory(error)
        if mistake is None:
            raise
    if not mistake.shared or os.environ.get("RANK", "0") == "0":
        print("\n".join(f"dist-spin: {line}" for line in mistake.lines()), file=sys.stderr, flush=True)
    if isinstance(mistake, RankLost):
        sys.stdout.flush()
        os._exit(mistake.exit_code)  # the process group cannot be left in order any more
    return mistake.exit_code


def _run_verb(words: list[str]) -> int:
    if "--version" in words:
        print(f"dist-spin {__version__}")
        return EXIT_OK
    name = next((word for word in words if not word.startswith("-")), None)
    if name == "help":  # `help VERB` is `VERB --help`; `help SETTING` explains a setting
        words = [*words[: words.index("help")], *words[words.index("help") + 1 :], "--help"]
        name = next((word for word in words if not word.startswith("-")), None)
        groups = typing.get_type_hints(RunConfig)
        if name is not None and name not in VERBS and ("." in name or name in groups):
            print(settings_help(name if "." in name or name in LOCATION else f"{name}."), end="")
            return EXIT_OK
    if name is not None and name not in VERBS:
        meant = did_you_mean(closest(name, VERBS))
        if name.endswith(YAML_ENDINGS):
            meant = f"did you mean `dist-spin run {shlex.quote(name)}`? "
        raise UserError(f"there is no verb '{name}'", f"{meant}`dist-spin --help` lists the verbs", shared=True)
    parser = _parser()
    options, rest = parser.parse_known_args(words if name or "--help-all" in words else ["--help"])
    _check_options(parser, options.verb, rest)
    quiet, verbose = (getattr(options, flag, False) for flag in ("quiet", "verbose"))
    console = Console(sys.stderr, int(os.environ.get("RANK", "0")), quiet=quiet, verbose=verbose)
    verb = VERBS[options.verb]
    with shown_on(console):
        return verb.call(command.Command(options.verb, verb.function, options, rest, console))


def _check_options(parser: Parser, verb: str, rest: list[str]) -> None:
    """Refuse words that look like a misspelt option of the verb; `--key.sub VALUE` is a setting, and so is --name."""
    own = parser.verbs[verb].option_names()
    for word in rest:
        name = word.partition("=")[0]
        setting = not word.startswith("-") or "." in name or name.removeprefix("--") in LOCATION
        if not setting and (meant := closest(name.lstrip("-"), own)):
            problem = f"{verb} has no option {name}"
            raise UserError(problem, f"did you mean --{meant[0]}? `dist-spin {verb} --help` lists them", shared=True)


def _parser() -> Parser:
    table = "\n".join(f"  {name:12}{verb.what}" for name, verb in VERBS.items())
    how = (
        "`dist-spin VERB --help` explains a verb and lists the settings that it reads, `dist-spin help optimize.lr` explains "
        "a setting;\n--help-all explains every setting."
    )
    epilog = f"verbs:\n{table}\n\n{how}\n"
    common: dict[str, Any] = {
        "parents": [every_verb()],
        "allow_abbrev": False,
    }  # --name VALUE sets `name`, not --names
    parser = Parser(prog="dist-spin", usage="dist-spin VERB ...", epilog=epilog, **common)
    parser.add_argument("--help-all", action=HelpAll, nargs=0, help="as --help, with every setting there is")
    parser.add_argument("--version", action="store_true", default=SUPPRESS, help="say which version this is")
    verbs = parser.add_subparsers(dest="verb", prog="dist-spin", help=SUPPRESS, required=True)
    for name, verb in VERBS.items():
        usage = f"dist-spin {name} {verb.takes} [options]" if verb.takes else None
        more: dict[str, Any] = {"epilog": f"for example: dist-spin {name} {verb.example}"} if verb.example else {}
        own = verbs.add_parser(name, usage=usage, description=verb.what, reads=verb.reads, **more, **common)
        if verb.reads:
            own.add_argument("--help-all", action=HelpAll, nargs=0, help="as --help, with every setting there is")
        verb.options(own)
        parser.verbs[name] = own
    return parser


def _bench_options(parser: Parser) -> None:
    # By its name, as the functions of verbs: no import arrow from the command line to what it starts.
    bench_options: Any = importlib.import_module("dist_spin.bench.options")
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, meaning in bench_options.BENCHES.items():
        more: dict[str, Any] = {"parents": [every_verb()]}
        if name in ("optimize", "pipeline"):
            usage = f"{parser.prog} {name} SHAPE [key.sub=value ...] [options]"
            reads = VERBS["optimize" if name == "optimize" else "run"].reads
            more |= {"reads": reads, "usage": usage, "allow_abbrev": False}
        bench_options.add_arguments(name, benches.add_parser(name, help=meaning, description=meaning, **more))


CONFIG = "CONFIG.yaml [key.sub=value ...]"
MODEL = ("model", "rotation", "quant")
PROCESS = ("distributed.timeout_s", "distributed.device", "distributed.threads")
SHARDED = (*PROCESS, *(f"distributed.{name}" for name in ("offload_layers", "offload_dir", "engine", "shard_ranks")))
TARGET = ("export.target", "export.profile")
EVERY_STAGE = (*MODEL, "optimize", "quantize", "evaluate", "export", "report", "distributed")
CALIBRATION = tuple(f"quantize.{name}" for name in ("source", "split", "seq_len", "n_sequences", "seed"))
LEARNED_ON = tuple(f"optimize.{name}" for name in ("steps", "source", "seq_len", "batch_size", "optimizer"))
TEXTS = tuple(f"evaluate.{name}" for name in ("sources", "split", "seq_len", "max_sequences", "fidelity"))
VERBS = {
    "init": Verb(
        "write a first CONFIG.yaml, with a comment at every setting; asks for what is not given",
        "dist_spin.config.starter:init",
        command.call_init,
        verb_options.init_options,
        example="--model meta-llama/Llama-3.1-8B --gpus 8 --target compressed-tensors",
    ),
    "run": Verb(
        "learn rotations, quantise, measure, export: every stage, on this machine",
        "dist_spin.launch.local_pipeline:run_stages",
        command.call_run,
        reads=EVERY_STAGE,
        takes=CONFIG,
        example="quickstart.yaml optimize.steps=20",
    ),
    "plan": Verb(
        "say before a run whether it fits, and the seconds, memory and disk of each part",
        "dist_spin.bench.plan:plan",
        command.call_plan,
        verb_options.plan_options,
        EVERY_STAGE,
        CONFIG,
        example="llama-3.1-70b.yaml --gpus 4 --gpu h200",
    ),
    "optimize": Verb(
        "learn the rotations",
        "dist_spin.optimize.train:train",
        command.call_stage,
        reads=(*MODEL, "optimize", "quantize.method", "quantize.tune_steps", *TARGET, "report.tensorboard", *SHARDED),
        takes=CONFIG,
        example="quickstart.yaml optimize.steps=50",
    ),
    "quantize": Verb(
        "merge the rotations and quantise the weights",
        "dist_spin.quantize.stage:quantize",
        command.call_quantize,
        verb_options.quantize_options,
        (*MODEL, "optimize.steps", "optimize.clips", "quantize", *TARGET, *PROCESS),
        CONFIG,
        example="quickstart.yaml --cluster local",
    ),
    "evaluate": Verb(
        "measure perplexity and zero-shot tasks",
        "dist_spin.evaluate.stage:evaluate",
        command.call_stage,
        reads=(*MODEL, "optimize.steps", "optimize.clips", "quantize", "evaluate", *TARGET, *PROCESS),
        takes=CONFIG,
        example="quickstart.yaml evaluate.sources=text:my.txt#all",
    ),
    "export": Verb(
        f"write the model for another program: {', '.join(FORMATS)}",
        "dist_spin.export.stage:export",
        command.call_export,
        verb_options.export_options,
        (*MODEL, *LEARNED_ON, "optimize.a_bits", "quantize", "export", *PROCESS),
        f"RUN|{CONFIG}",
        example="runs/quickstart --format compressed-tensors",
    ),
    "serve-check": Verb(
        "load exports in vLLM and compare what it computes with dist_spin.load",
        "dist_spin.serve.check:serve_check",
        command.call_serve_check,
        verb_options.serve_check_options,
        takes="EXPORT ...",
        example="runs/quickstart/export/compressed-tensors --python .vllm/bin/python",
    ),
    "compare": Verb(
        "measure RTN, GPTQ, SmoothQuant, QuaRot, SpinQuant and ours at several bit widths: the table",
        "dist_spin.compare.stage:compare",
        command.call_stage,
        reads=(
            *(*MODEL, "optimize", "quantize", "methods", "compare", *TEXTS),
            *(*TARGET, "report.tensorboard", *SHARDED),
        ),
        takes=CONFIG,
        example="compare.yaml compare.bits=W4A4KV4",
    ),
    "report": Verb(
        "write report.html and report.md of a run, finished or not, or one page of several runs",
        "dist_spin.report.stage:report",
        command.call_report,
        verb_options.report_options,
        reads=(
            *MODEL,
            "optimize.steps",
            *CALIBRATION,
            "quantize.baselines",
            "quantize.tune_steps",
            "report.sequences",
            *PROCESS,
        ),
        takes=f"RUN [RUN ...]|{CONFIG}",
        example="runs/quickstart",
    ),
    "plot": Verb(
        "draw one figure of a run as PNG or SVG; without FIGURE, list the figures",
        "dist_spin.report.plot:plot",
        command.call_on_run,
        verb_options.plot_options,
        example="runs/quickstart loss -o loss.png",
    ),
    "generate": Verb(
        "let the full-precision and the quantised model continue a text",
        "dist_spin.evaluate.generate:generate",
        command.call_on_run,
        verb_options.generate_options,
        example="runs/quickstart 'The capital of France is'",
    ),
    "chat": Verb(
        "chat with the full-precision and the quantised model side by side",
        "dist_spin.evaluate.generate:chat",
        command.call_on_run,
        verb_options.chat_options,
        example="runs/quickstart",
    ),
    "submit": Verb(
        "submit every missing stage to a cluster, as jobs that depend on each other",
        "dist_spin.launch.slurm_pipeline:submit",
        command.call_submit,
        verb_options.submit_options,
        EVERY_STAGE,
        CONFIG,
        example="llama.yaml --slurm partition=gpu --slurm nodes=2 --slurm time=240",
    ),
    "status": Verb(
        "show how far a run is",
        "dist_spin.report.status:show_status",
        command.call_on_run,
        verb_options.status_options,
        example="runs/quickstart --watch",
    ),
    "logs": Verb(
        "show the end of everything a run's jobs printed",
        "dist_spin.report.logs:logs",
        command.call_on_run,
        verb_options.run_options,
        example="runs/quickstart",
    ),
    "cancel": Verb(
        "end what is at work on a run, on Slurm or on this machine; it saves first",
        "dist_spin.report.cancel:cancel",
        command.call_on_run,
        verb_options.run_options,
        example="runs/quickstart",
    ),
    "bench": Verb(
        "time a stage on this machine's devices", "", command.call_bench, _bench_options, example="scaling --help"
    ),
}
