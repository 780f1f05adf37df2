"""The command line: parse, build, call one stage.

dist-spin run configs/quickstart.yaml optimize.steps=20
torchrun --nproc_per_node 2 -m dist_spin optimize configs/quickstart.yaml
"""

import importlib
import json
import os
import socket
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_spin.config.export import ExportConfig
from dist_spin.config.help import config_help
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import EXIT_HANG, EXIT_OK, UserError, out_of_memory
from dist_spin.model.checkpoint_headers import check_model_path
from dist_spin.runtime.progress import where

VERBS = {
    "run": "learn rotations, quantise, measure: every stage, on this machine",
    "optimize": "learn the rotations",
    "quantize": "merge the rotations and quantise the weights",
    "evaluate": "measure perplexity",
    "export": "write the model for another program: hf, compressed-tensors, gguf or executorch",
    "compare": "measure RTN, GPTQ, SmoothQuant, QuaRot, SpinQuant and ours at several bit widths: the table",
    "report": "write report.html and report.md: tables and pictures of a run, finished or not",
    "plot": "one figure of a run as PNG or SVG; names them if none is given",
    "generate": "let the full-precision and the quantised model continue a text",
    "chat": "ask both models on standard input",
    "submit": "hand every missing stage to a cluster as jobs that wait for each other",
    "status": "show where a run stands",
    "logs": "show the end of everything a run's jobs printed",
    "cancel": "end a run's jobs; they save first",
    "bench": "time a stage on this machine's devices: bench optimize SHAPE, bench quantize --shape 8b, bench inference SHAPE",
}
STAGES = {
    "optimize": "dist_spin.optimize.train:train",
    "quantize": "dist_spin.quantize.stage:quantize",
    "evaluate": "dist_spin.evaluate.stage:evaluate",
    "export": "dist_spin.export.stage:export",
    "compare": "dist_spin.compare.stage:compare",
    "report": "dist_spin.report.stage:report",
}
USAGE = """usage: dist-spin VERB CONFIG.yaml [key.sub=value ...]
       dist-spin quantize CONFIG.yaml [--layers A:B | --boundaries] [key.sub=value ...]
       dist-spin quantize CONFIG.yaml --cluster local|slurm|submitit-local|debug [--workers N] [--retries N]
                          [--slurm key=value ...] [key.sub=value ...]
       dist-spin export RUN|CONFIG.yaml --format hf|compressed-tensors|gguf|executorch [--output DIR] [key.sub=value ...]
       dist-spin report CONFIG.yaml [key.sub=value ...]       # measures the activations first
       dist-spin report RUN                                   # from the run's files alone
       dist-spin plot RUN [FIGURE [-o FILE.png|FILE.svg] [--dark]]
       dist-spin generate RUN "TEXT" [--tokens N]
       dist-spin chat RUN [--tokens N]
       dist-spin submit CONFIG.yaml --cluster slurm|local|debug [--slurm key=value ...] [key.sub=value ...]
       dist-spin status RUN [--json] [--watch]
       dist-spin logs RUN
       dist-spin cancel RUN"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (see `dist_spin.errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(words)
    except Exception as error:
        mistake = error if isinstance(error, UserError) else out_of_memory(error)
        if mistake is None:
            raise
    if not mistake.shared or os.environ.get("RANK", "0") == "0":
        print(f"dist-spin: {mistake}", file=sys.stderr, flush=True)
    return mistake.exit_code


def _main(words: list[str]) -> int:
    verb = words[0] if words else "--help"
    if verb in ("--help", "-h", "help"):
        print(f"{USAGE}\n\nverbs:\n" + "\n".join(f"  {name:10}{what}" for name, what in VERBS.items()))
        print("\n`dist-spin VERB --help` lists every setting.")
        return EXIT_OK
    if verb not in VERBS:
        raise UserError(f"there is no verb '{verb}'", f"use one of {', '.join(VERBS)}")
    rest = words[1:]
    if verb == "bench":
        return _bench(rest)
    if "--help" in rest or "-h" in rest:
        print(f"dist-spin {verb}: {VERBS[verb]}\n{USAGE}\n\n{config_help()}")
        return EXIT_OK
    if verb == "status":
        return _status(rest)
    if verb in ("logs", "cancel"):
        return _jobs(verb, rest)
    if verb == "submit":
        return _submit(rest)
    if verb == "plot":
        return _plot(rest)
    if verb in ("generate", "chat"):
        return _speak(verb, rest)
    if verb == "report" and rest and Path(rest[0]).is_dir():
        return _report(rest)
    if verb == "quantize":
        return _quantize(rest)
    if verb == "export":
        return _export(rest)
    path = _config_path(rest)
    config = _settings(path, rest)
    if verb == "run":
        check_model_path(config.model.path, dummy=config.model.dummy_weights)
        return _load("dist_spin.launch.local_pipeline:run_stages")(
            ([path] if path else []) + rest, config.distributed.nproc
        )
    return _stage(verb, config)


def _load(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _config_path(rest: list[str]) -> str | None:
    """Take the configuration file off the front of the words, if one is given."""
    return rest.pop(0) if rest and "=" not in rest[0] and not rest[0].startswith("--") else None


def _settings(path: str | None, overrides: list[str]) -> RunConfig:
    try:
        return load_config(path, overrides)
    except UserError as error:
        raise error.as_shared() from None  # every rank reads the same settings


def _quantize(rest: list[str]) -> int:
    """`quantize` in this process, one job of it, or all of its jobs in parallel."""
    boundaries = "--boundaries" in rest
    rest = [word for word in rest if word != "--boundaries"]
    layers, cluster, workers, retries = (
        next(reversed(_option(rest, name)), None) for name in ("--layers", "--cluster", "--workers", "--retries")
    )
    scheduler = _option(rest, "--slurm")
    path = _config_path(rest)
    config = _settings(path, rest)
    if cluster is None:
        for name, given in (("--workers", workers), ("--retries", retries), ("--slurm", scheduler)):
            if given:
                raise UserError(f"{name} is for a fan-out", "add --cluster local (or slurm)")
        return _stage("quantize", config, layers=_range(layers), hidden_states_only=boundaries)
    if layers or boundaries:
        raise UserError("--layers and --boundaries are single jobs, which --cluster starts itself", "leave one out")
    quieten_libraries()
    return _load("dist_spin.launch.fanout:fan_out")(
        ([path] if path else []) + rest,
        config,
        cluster,
        workers=_count("--workers", workers, 0),
        retries=_count("--retries", retries, 3),
        scheduler=scheduler,
    )


def _export(rest: list[str]) -> int:
    """`export` of a run's directory, with the settings in it, or of the run that a configuration names."""
    formats = typing.get_args(ExportConfig.__annotations__["target"])[1:]  # all but "none"
    target, output = (next(reversed(_option(rest, name)), None) for name in ("--format", "--output"))
    path = _config_path(rest)
    if path and Path(path).is_dir():
        run = Path(path).resolve()  # wherever it was moved to since
        path, rest = str(run / "config.yaml"), [f"output_dir={run.parent}", f"name={run.name}", *rest]
    config = _settings(path, rest)
    chosen = target or config.export.target
    if chosen not in formats:
        raise UserError(f"there is no export format {chosen!r}", f"give --format {'|'.join(formats)}")
    return _stage("export", config, target=chosen, output=Path(output) if output else None)


def _option(rest: list[str], name: str) -> list[str]:
    """Take every `NAME VALUE` and `NAME=VALUE` out of the words; the values."""
    values = []
    while (at := next((i for i, word in enumerate(rest) if word.partition("=")[0] == name), None)) is not None:
        word = rest.pop(at)
        if "=" in word:
            values.append(word.partition("=")[2])
        elif at < len(rest):
            values.append(rest.pop(at))
        else:
            raise UserError(f"{name} is given no value", f"write {name} VALUE")
    return values


def _count(name: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdigit():
        raise UserError(f"{name} is {text!r}", "give a whole number")
    return int(text)


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit()):
        raise UserError(f"--layers is {text!r}", "write A:B for layers A to B-1, such as 0:10")
    return int(start), int(stop)


def _stage(verb: str, config: RunConfig, **options: Any) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # several ranks agree on it when they open the model
        check_model_path(config.model.path, dummy=config.model.dummy_weights)
    quieten_libraries()
    # Imported late, so that --help and mistakes in the configuration answer at once.
    import torch.distributed as dist

    from dist_spin.pipeline.stage_context import writing
    from dist_spin.runtime.distributed import start, stop

    # By name, so that no verb waits for, or needs, what only another one imports.
    stage: Callable[..., Any] = _load(STAGES[verb])
    timeout = config.distributed.timeout_s
    alone = verb == "compare" and config.compare.parallel == "rows"
    world = start(config.distributed.device, timeout, config.distributed.threads, alone=alone)
    layers = options.get("layers")
    part = "boundaries" if options.get("hidden_states_only") else options.get("target", "")
    part = f"{layers[0]}-{layers[1]}" if layers else part
    part = f"{socket.gethostname()}-{os.getpid()}" if alone else part
    try:
        with writing(config, world, verb, part):
            stage(config, world, **options)
    except (dist.DistBackendError, dist.DistNetworkError, RuntimeError) as error:
        if "imed out" not in str(error) and "Connection" not in str(error) and "connection" not in str(error):
            raise
        first = str(error).strip().splitlines()[0][:200]
        print(
            f"dist-spin: rank {world.rank} of {world.size} on {socket.gethostname()}: no answer from another rank within "
            f"{timeout} s at {where()} ({first}); start again to resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_HANG)  # the process group cannot be left in order any more
    finally:
        stop()
    return EXIT_OK


def _bench(rest: list[str]) -> int:
    quieten_libraries()
    from dist_spin.bench import inference, optimize, quantize, scaling

    benches = {
        "optimize": optimize.main,
        "quantize": quantize.main,
        "inference": inference.main,
        "scaling": scaling.main,
    }
    if rest in (["--help"], ["-h"]):
        print("dist-spin bench " + "|".join(benches) + " --help explains each")
        return EXIT_OK
    if not rest or rest[0] not in benches:
        raise UserError(
            f"bench takes one of {', '.join(benches)}",
            "dist-spin bench optimize configs/shapes/llama-3-8b, or bench quantize --shape 8b",
        )
    return benches[rest[0]](rest[1:])


def quieten_libraries() -> None:
    """Leave the terminal to our own progress: transformers draws bars, torchao tells of libraries for other devices."""
    import logging

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _submit(rest: list[str]) -> int:
    cluster = (_option(rest, "--cluster") or ["slurm"])[-1]
    scheduler = _option(rest, "--slurm")
    path = _config_path(rest)
    config = load_config(path, rest)
    quieten_libraries()
    return _load("dist_spin.launch.slurm_pipeline:submit")(([path] if path else []) + rest, config, cluster, scheduler)


def _run_directory(verb: str, rest: list[str], flags: tuple[str, ...] = ()) -> Path:
    paths = [word for word in rest if not word.startswith("--")]
    if len(paths) != 1 or not set(rest) <= {*paths, *flags}:
        what = f"{verb} takes one run directory, not {' '.join(rest) or 'nothing'}"
        raise UserError(what, f"dist-spin {verb} runs/NAME {' '.join(f'[{flag}]' for flag in flags)}".strip())
    return Path(paths[0])


def _status(rest: list[str]) -> int:
    from dist_spin.report.status import status, status_text, watch

    path = _run_directory("status", rest, ("--json", "--watch"))
    show = (lambda figures: json.dumps(figures, indent=1)) if "--json" in rest else status_text
    if "--watch" in rest:
        watch(path, show)
    else:
        print(show(status(path)))
    return EXIT_OK


def _report(rest: list[str]) -> int:
    quieten_libraries()
    from dist_spin.report.stage import write_report

    write_report(_run_directory("report", rest))
    return EXIT_OK


def _plot(rest: list[str]) -> int:
    quieten_libraries()
    from dist_spin.report.plot import plot

    dark = "--dark" in rest
    rest = [word for word in rest if word != "--dark"]
    target = next(reversed(_option(rest, "-o")), None)
    if not 1 <= len(rest) <= 2 or any(word.startswith("-") for word in rest):
        raise UserError(
            f"plot does not take {' '.join(rest) or 'nothing'}", "dist-spin plot runs/NAME [FIGURE] [-o FILE]"
        )
    plot(Path(rest[0]), rest[1] if len(rest) > 1 else "", target, "dark" if dark else "light")
    return EXIT_OK


def _speak(verb: str, rest: list[str]) -> int:
    quieten_libraries()
    from dist_spin.evaluate.generate import TOKENS, chat, generate

    tokens = _count(
        "--tokens", next(reversed(_option(rest, "--tokens")), None), 4 * TOKENS if verb == "chat" else TOKENS
    )
    if len(rest) != (2 if verb == "generate" else 1):
        example = 'dist-spin generate runs/NAME "some text"' if verb == "generate" else "dist-spin chat runs/NAME"
        raise UserError(f"{verb} does not take {' '.join(rest) or 'nothing'}", example)
    if verb == "chat":
        chat(Path(rest[0]), tokens)
    else:
        generate(Path(rest[0]), rest[1], tokens)
    return EXIT_OK


def _jobs(verb: str, rest: list[str]) -> int:
    from dist_spin.report.status import cancel, logs

    path = _run_directory(verb, rest)
    print(logs(path) if verb == "logs" else cancel(path))
    return EXIT_OK
