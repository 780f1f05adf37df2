"""One call of the command line, and how the function behind a verb is called.

Everything that a verb needs is imported once its settings are read, so that mistakes in them are answered at once.
"""

import argparse
import contextlib
import importlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_spin.config.checks import one_line
from dist_spin.config.command_parser import EVERYWHERE
from dist_spin.config.examples import examples
from dist_spin.config.export import FORMATS
from dist_spin.config.loader import load_config, setting_names
from dist_spin.config.run import RunConfig, reading_stages
from dist_spin.config.suggestions import closest, did_you_mean
from dist_spin.config.yaml_text import YAML_ENDINGS
from dist_spin.errors import EXIT_OK, UserError
from dist_spin.model.checkpoint_headers import check_model_path
from dist_spin.runtime.console import Console, quieten_libraries
from dist_spin.runtime.processes import TURN, wait_for_turn
from dist_spin.runtime.progress import long_step


@dataclass(frozen=True)
class Command:
    """One call of the program, taken apart."""

    verb: str
    function: str  # "module:function"
    options: argparse.Namespace
    words: list[str]  # what no option took: CONFIG.yaml and settings
    console: Console

    def settings(self) -> tuple[RunConfig, list[str]]:
        """The run's settings, and the words that give them to another process.

        Raises:
            UserError: as `load_config`, and every rank alike.
        """
        settings = setting_names()
        path = next((w for w in self.words[:1] if "=" not in w and not w.startswith("--") and w not in settings), None)
        if path is not None:
            check_config_path(path, self.verb)
        flags = [f"--{name}" for name in ("quiet", "verbose") if getattr(self.options, name, False)]
        try:
            config = load_config(path, self.words[1:] if path else self.words).with_base_dir()
            return config, [*self.words, *flags]
        except UserError as error:
            raise error.as_shared() from None

    def quieten(self) -> None:
        """Leave standard error to our own lines, unless --verbose asks for what libraries say."""
        if not self.console.verbose:
            quieten_libraries()

    def no_more(self) -> None:
        """Raise UserError if a word is left that means nothing here."""
        if self.words:
            problem = f"{self.verb} does not take {' '.join(self.words)}"
            raise UserError(problem, f"`dist-spin {self.verb} --help` says what it takes")


def load(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def call_stage(command: Command, config: RunConfig | None = None, part: str = "", **options: Any) -> int:
    """function(config, world, **options), on every rank, as the one writer of this stage (or `part` of it) of the run."""
    config = config or command.settings()[0]
    # Several ranks agree on it when they open the model, and a report without it tells the rest.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and command.verb != "report":
        check_model_path(config.model_path, dummy=config.model.dummy_weights)
    with contextlib.nullcontext() if TURN in os.environ else long_step("import torch and transformers"):
        command.quieten()
        from dist_spin.pipeline.stage_context import joined

        stage = load(command.function)
    wait_for_turn()
    alone = command.verb == "compare" and config.compare.parallel == "rows"
    part = f"{socket.gethostname()}-{os.getpid()}" if alone else part
    with joined(config, command.console, command.verb, part, alone=alone) as (config, world):
        stage(config, world, **options)
    return EXIT_OK


def call_quantize(command: Command) -> int:
    """In this process, one job of it, or all of its jobs in parallel."""
    options = command.options
    config, words = command.settings()
    if options.cluster is None:
        for name in ("workers", "retries", "slurm"):
            if getattr(options, name) not in (None, []):
                raise UserError(f"--{name} is for a fan-out", "add --cluster local (or slurm)", shared=True)
        part = "{}-{}".format(*options.layers) if options.layers else "boundaries" if options.hidden_states else ""
        return call_stage(command, config, part, layers=options.layers, hidden_states_only=options.hidden_states)
    if options.layers or options.hidden_states:
        problem = "--layers and --hidden-states are single jobs, which --cluster starts itself"
        raise UserError(problem, "leave one out", shared=True)
    command.quieten()
    fan_out = load("dist_spin.launch.fanout:fan_out")
    retries = 3 if options.retries is None else options.retries
    return fan_out(
        words, config, options.cluster, workers=options.workers or 0, retries=retries, scheduler=options.slurm
    )


def call_export(command: Command) -> int:
    """Of a run's directory, with the settings in it, or of the run that a configuration names."""
    words, output = command.words, command.options.output
    check_run_or_config(command)
    if words and Path(words[0]).is_dir():
        run = Path(words[0]).resolve()  # wherever it was moved to since
        words[:1] = [str(run / "config.yaml"), f"output_dir={run.parent}", f"name={run.name}"]
    config, _ = command.settings()
    target = command.options.format or config.export.target
    if target not in FORMATS:
        meant = did_you_mean(closest(target, FORMATS)) if target != "none" else ""
        problem = f"there is no export format {target!r}" if target != "none" else "no export format is given"
        raise UserError(problem, f"{meant}give --format {'|'.join(FORMATS)}", shared=True)
    return call_stage(command, config, target, target=target, output=output)


def call_report(command: Command) -> int:
    """Of one or several run directories, from their files alone; or of the run that a configuration names, measured first."""
    check_run_or_config(command)
    output, one = command.options.output, "leave it out: a run's report lies in its directory"
    if not (command.words and os.path.isdir(command.words[0])):
        if output is not None:
            raise UserError("-o is for several runs side by side", one)
        return call_stage(command)
    runs = [Path(word) for word in command.words if "=" not in word and not word.startswith("-")]
    command.words[:] = [word for word in command.words if Path(word) not in runs]
    command.no_more()
    for path in runs:
        check_run_directory(path)
    if output is not None and len(runs) == 1:
        raise UserError("-o is for several runs side by side", one)
    command.quieten()
    if len(runs) == 1:
        load("dist_spin.report.stage:write_report")(runs[0])
    else:
        load("dist_spin.report.stage:write_side_by_side")(runs, output)
    return EXIT_OK


def call_run(command: Command) -> int:
    """function(words, ranks, run directory, stages), which starts every stage in processes of its own."""
    config, words = command.settings()
    lengths = {f"{stage}.seq_len": getattr(config, stage).seq_len for stage in reading_stages(config)}
    check_model_path(config.model_path, dummy=config.model.dummy_weights, lengths=lengths)
    run = Path(config.path(config.output_dir)) / config.name
    stages = load("dist_spin.launch.local_pipeline:stages_of")(config)
    code: int = load(command.function)(words, config.distributed.nproc, run, stages)
    return code


def call_plan(command: Command) -> int:
    """function(config, **options)."""
    config, _ = command.settings()
    command.quieten()
    names = ("gpus", "kind", "gpu_memory", "host_memory", "disk", "as_json")
    code: int = load(command.function)(config, **{name: getattr(command.options, name) for name in names})
    return code


def call_submit(command: Command) -> int:
    """function(words, config, cluster, scheduler settings)."""
    config, words = command.settings()
    command.quieten()
    code: int = load(command.function)(words, config, command.options.cluster, command.options.slurm)
    return code


def call_on_run(command: Command) -> int:
    """function(path, **options) of a run's directory, whose text is printed if it returns one."""
    options = {name: value for name, value in vars(command.options).items() if name not in ("verb", *EVERYWHERE)}
    for name, value in options.items():  # argparse gives up on optional words once another option came between
        if value is None and name in ("prompt", "name") and command.words:
            options[name] = command.words.pop(0)
    command.no_more()
    check_run_directory(options["path"])
    if command.verb == "generate" and options["prompt"] is None:
        raise UserError("generate is given no text", 'dist-spin generate runs/NAME "some text"')
    if command.verb in ("plot", "generate", "chat"):
        command.quieten()
    text = load(command.function)(**{name: value for name, value in options.items() if value is not None})
    if isinstance(text, str):
        print(text)
    return EXIT_OK


def call_init(command: Command) -> int:
    """function(file, **options), whose text is printed."""
    options = vars(command.options)
    file = options["file"] or (Path(command.words.pop(0)) if command.words else None)
    command.no_more()
    given = {name: options[name] for name in ("model", "gpus", "target", "example", "force")}
    print(load(command.function)(file, **given))
    return EXIT_OK


def call_serve_check(command: Command) -> int:
    """function(paths, **options) of exports, wherever they lie."""
    left_out = ("verb", "engine", *EVERYWHERE)  # there is one engine
    options = {name: value for name, value in vars(command.options).items() if name not in left_out}
    command.no_more()
    command.quieten()
    load(command.function)(
        **{name: value for name, value in options.items() if value is not None}, shown=command.console.verbose
    )
    return EXIT_OK


def call_bench(command: Command) -> int:
    """run(options) of one file of dist_spin.bench."""
    bench = command.options.bench
    if bench in ("optimize", "pipeline"):
        command.options.settings = command.words
    else:
        command.no_more()
    if bench == "pipeline":
        command.options.start = load("dist_spin.launch.local_pipeline:run_stages")
    command.quieten()
    code: int = load(f"dist_spin.bench.{bench}:run")(command.options)
    return code


def check_run_directory(path: Path) -> None:
    """Raise UserError if `path` is no run's directory."""
    if not is_run(path):
        there = "it has no config.yaml" if os.path.isdir(path) else "there is no such directory"
        if os.path.isfile(path):
            there = "it is a file"
        runs = [run for base in {path.parent, Path("runs")} if base.is_dir() for run in base.iterdir() if is_run(run)]
        names = {run.name: str(run) for run in runs}
        meant = did_you_mean([names[name] for name in closest(path.name, names)])
        raise UserError(f"{one_line(str(path))} is no run directory ({there})", f"{meant}give runs/NAME", shared=True)


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a run."""
    return any(
        os.path.exists(path / name) for name in ("config.yaml", "events.jsonl")
    )  # False for what may not be read


def check_run_or_config(command: Command) -> None:
    """Raise UserError if a verb that takes a run or a configuration is given neither."""
    if not command.words:
        remedy = f"write `dist-spin {command.verb} runs/NAME`, or the CONFIG.yaml that the run was started with"
        raise UserError(f"{command.verb} is given no RUN", remedy, shared=True)
    path = command.words[0]
    if "=" not in path and not path.startswith("--") and not os.path.isfile(path) and not path.endswith(YAML_ENDINGS):
        check_run_directory(Path(path))


def check_config_path(path: str, verb: str) -> None:
    """Raise UserError if something else is given in the place of CONFIG.yaml: a model, a run, or a word that is no file."""
    here, printed = Path(os.path.expanduser(path)), one_line(path)
    if is_run(here):
        raise UserError(f"{printed} is a run", f"write {verb} {one_line(str(here / 'config.yaml'))}", shared=True)
    if os.path.exists(here / "config.json") or path.endswith(".gguf") or path.startswith("package:"):
        raise UserError(f"{printed} is a model, not a CONFIG.yaml", f"write model.path={printed}", shared=True)
    if os.path.lexists(here):
        return
    problem = f"cannot read {printed}: No such file or directory"
    if not path.endswith(YAML_ENDINGS):
        remedy = f"give a CONFIG.yaml (`dist-spin init` writes one), or a model as model.path={printed}"
        raise UserError(problem, remedy, shared=True)
    if here.stem in examples():
        raise UserError(problem, f"`dist-spin init --example {here.stem}` writes it here", shared=True)
    files = [str(file) for ending in YAML_ENDINGS for file in here.parent.glob(f"*{ending}")]
    raise UserError(problem, f"{did_you_mean(closest(str(here), files))}`dist-spin init` writes one", shared=True)
