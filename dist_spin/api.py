"""The stages from Python: a run as an object, in a notebook, in a script, or in a script under torchrun.

    import dist_spin

    run = dist_spin.Run("quickstart.yaml", name="first", optimize={"steps": 20})
    run.learn_rotations()
    run.quantize()
    run.evaluate().to_frame()
    model = dist_spin.load(run.export("hf"))

Every method does what the verb of the command line does, on the same files: what is finished is not done again, and a run that
one of them started the other continues. They are methods of one object, because `dist_spin.quantize` and `dist_spin.evaluate`
are already the folders where these stages live.

A call leaves the process as it found it: signal handlers, threads, environment, process group, number of torch threads. Under
torchrun the connection over which the ranks have met stays open.
"""

import contextlib
import html
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_spin.config.export import FORMATS
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.config.suggestions import closest, did_you_mean
from dist_spin.errors import UserError, out_of_memory
from dist_spin.model.checkpoint_headers import check_model_path
from dist_spin.runtime import signals
from dist_spin.runtime.console import Console, libraries_quiet, shown_on
from dist_spin.runtime.text_table import aligned

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

WHERE = "the arguments of Run"
NOT_SHOWN = ("event", "time", "pid")  # of an event


class Table(list[dict[str, Any]]):
    """Rows of results, each a dictionary from column to value; rows need not have the same columns."""

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they first come."""
        return list(dict.fromkeys(name for row in self for name in row))

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a pandas DataFrame; NaN where a row lacks a column."""
        import pandas as pd

        return pd.DataFrame(list(self), columns=self.columns)

    def __str__(self) -> str:
        """An aligned text table."""
        return "\n".join(aligned([self.columns, *self._texts()]))

    def _repr_html_(self) -> str:
        """What notebooks show."""

        def line(texts: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        rows = "".join(line(texts, "td") for texts in self._texts())
        return f"<table><thead>{line(self.columns, 'th')}</thead><tbody>{rows}</tbody></table>"

    def _texts(self) -> list[list[str]]:
        return [[_text(row.get(name)) for name in self.columns] for row in self]


@dataclass(frozen=True)
class LearnedRotations:
    """What `Run.learn_rotations` leaves.

    path: rotations/final.safetensors of the run, in the precision it was learned in. r_bin: the same in fp32 under the published
    names, for other tools. steps: a row per learning step: step (from 1), loss (nats per token), grad_norm, lr, seconds and more;
    empty where nothing was learned (optimize.steps=0).
    """

    path: Path
    r_bin: Path
    steps: Table

    def tensors(self) -> "dict[str, Tensor]":
        """R1 [hidden, hidden] and R2 [layers, head size, head size], orthogonal, on the CPU; and learned scales and clips.

        Raises:
            dist_spin.storage.tensor_file.CorruptFile: the file is damaged.
        """
        from dist_spin.storage.tensor_file import load_tensors

        return load_tensors(self.path)[0]


class Run:
    """A run: its settings, its directory, and the stages as methods.

    Every method raises `dist_spin.errors.UserError` (or a class below it) with what is wrong and what to do, where the command
    line would print it: `Interrupted` after ctrl-C, when the state is saved and the same call continues; `NumericsError`;
    `OutOfMemory`; `Held` while another process works on the same stage. After `RankLost` the process should end.
    """

    def __init__(
        self, config: "RunConfig | str | os.PathLike[str] | None" = None, *, quiet: bool = False, **settings: Any
    ) -> None:
        """Settings are checked here; nothing is read or written yet but the configuration.

        Args:
            config: settings as an object; or the path of a YAML file, or of a run's directory, which is opened where it lies now.
            quiet: show warnings alone. Otherwise progress is printed on standard output.
            settings: what takes the place of the configuration's: `name`, `output_dir`, and groups as dictionaries, such as
                `model={"path": "HuggingFaceTB/SmolLM2-135M"}, quant={"w_bits": 4}`; the settings reference lists them.

        Raises:
            UserError: a setting is unknown, of the wrong type or out of range; all of them together.
            TypeError: settings beside a RunConfig, which `dataclasses.replace` changes.
        """
        if isinstance(config, RunConfig):
            if settings:
                raise TypeError("give settings with a file, or change the RunConfig with dataclasses.replace")
            self.config = config.with_base_dir()
        else:
            path = None if config is None else Path(config).expanduser()
            moved: list[str] = []
            if path is not None and (path / "config.yaml").exists():
                here = path.resolve()
                moved, path = [f"output_dir={here.parent}", f"name={here.name}"], path / "config.yaml"
            self.config = load_config(
                None if path is None else str(path), [*moved, *_words(settings)], WHERE
            ).with_base_dir()
        self.quiet = quiet

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, model={self.config.model.path!r})"

    @property
    def path(self) -> Path:
        """The run's directory, which every stage writes into; it need not be there yet."""
        return Path(self.config.path(self.config.output_dir)) / self.config.name

    @property
    def is_rank0(self) -> bool:
        """Whether this process is the first of those that torchrun or Slurm started; a process alone is."""
        names = ("RANK", "SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else ("RANK",)
        return next((os.environ[name] for name in names if name in os.environ), "0") == "0"

    def learn_rotations(self) -> LearnedRotations:
        """Learn R1 and R2, from the newest checkpoint where there is one (`dist-spin optimize`)."""
        self._call("optimize", "dist_spin.optimize.train:train")
        from dist_spin.storage.metrics import read_metrics

        rotations = self.path / "rotations"
        return LearnedRotations(rotations / "final.safetensors", rotations / "R.bin", Table(read_metrics(self.path)))

    def quantize(self) -> Table:
        """Merge the rotations and quantise the weights, layer by layer (`dist-spin quantize`).

        Returns:
            A row per finished layer of each variant (learned, and those of quantize.baselines): variant, layer, seconds, and the
            relative squared error of the output of its worst linear, with this method (error) and rounded to nearest (rtn_error).
        """
        self._call("quantize", "dist_spin.quantize.stage:quantize")
        from dist_spin.storage.run_records import read_events

        rows = {}
        for event in read_events(self.path):
            if event["event"] == "layer":
                rows[event["variant"], event["layer"]] = {k: v for k, v in event.items() if k not in NOT_SHOWN}
        return Table(rows.values())

    def evaluate(self) -> Table:
        """Measure perplexity and zero-shot tasks of the full-precision model and every variant (`dist-spin evaluate`).

        Returns:
            A row per variant and text or task: method, rotation, weights, w_bits, a_bits, k_bits, v_bits, seed, and dataset with
            ppl (perplexity) and, but for full precision, kl, kl_p99 (nats per token) and top1 (a share); or task with metric,
            value and stderr; or prompts with greedy_first (tokens before the first difference) and greedy_equal (a share).
        """
        return Table(self._call("evaluate", "dist_spin.evaluate.stage:evaluate"))

    def export(self, target: str = "", output: "str | os.PathLike[str] | None" = None) -> Path:
        """Write the model for another program (`dist-spin export`); one process does it.

        Args:
            target: hf, compressed-tensors, gguf or executorch; by default export.target of the settings.
            output: the directory to write; by default export/TARGET in the run's directory.

        Returns:
            The directory, which `dist_spin.load` takes for hf and compressed-tensors.
        """
        target = target or self.config.export.target
        if target not in FORMATS:
            hint = did_you_mean(closest(target, FORMATS))
            raise UserError(f"there is no export format {target!r}", f"{hint}give one of {', '.join(FORMATS)}")
        directory = None if output is None else Path(output).expanduser()
        path: Path = self._call("export", "dist_spin.export.stage:export", part=target, target=target, output=directory)
        return path

    def report(self) -> Path:
        """Write report.html and report.md of what there is so far (`dist-spin report`); returns the path of report.html."""
        self._call("report", "dist_spin.report.stage:report")
        return self.path / "report.html"

    def results(self) -> Table:
        """All rows that were measured so far, as `evaluate` returns them, read from results.json; empty without any."""
        from dist_spin.runtime.progress import warn
        from dist_spin.storage.results import load_results
        from dist_spin.storage.run_directory import RunDir

        return Table(load_results(RunDir(self.path), warn))

    def _call(self, stage: str, function: str, part: str = "", **options: Any) -> Any:
        """What the stage's function returns."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and stage != "report":
            check_model_path(self.config.model_path, dummy=self.config.model.dummy_weights)
        console = Console(sys.stdout, int(os.environ.get("RANK", "0")), quiet=self.quiet, bare=True)
        module, _, name = function.partition(":")
        with signals.embedded(), _process_as_before(), libraries_quiet(), shown_on(console):
            from dist_spin.pipeline.stage_context import joined

            run_stage = getattr(importlib.import_module(module), name)
            try:
                with joined(self.config, console, stage, part) as (config, world):
                    return run_stage(config, world, **options)
            except Exception as error:
                memory = out_of_memory(error)
                if memory is None:
                    raise
                raise memory from error


@contextlib.contextmanager
def _process_as_before() -> Iterator[None]:
    """Undo what a stage changes in the process: environment variables, torch's number of threads and current GPU."""
    import torch

    environment, threads = dict(os.environ), torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        torch.set_num_threads(threads)
        if device is not None:
            torch.cuda.set_device(device)


def _words(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as `key.sub=value`, as the command line has them."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _words(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_word(value)}"


def _word(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    plain = list(value) if isinstance(value, tuple | set) else value
    return json.dumps(plain, default=str, ensure_ascii=False)  # also YAML: true, null, 1e-05, ["a", "b"]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
