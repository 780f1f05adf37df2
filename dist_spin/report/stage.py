"""Write report.html and report.md of a run, finished or not, or one page of several runs.

dist-spin report CONFIG.yaml        measures the activations first, where that is not done; for this it reads the model
dist-spin report runs/NAME          from the files of the run alone, on any machine that sees them
dist-spin report runs/A runs/B ...  several runs side by side, on one page
"""

from pathlib import Path

from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.report.measure_activations import measure_activations
from dist_spin.report.page import html_page, markdown_page, runs_pages
from dist_spin.report.run_summary import load_run_summary
from dist_spin.runtime.distributed import World
from dist_spin.runtime.progress import say, warn
from dist_spin.storage.atomic import write_text
from dist_spin.storage.run_directory import run_dir


def report(config: RunConfig, world: World) -> None:
    """The stage: measure the activations of a run, then write its report.

    Raises:
        Interrupted: a signal came; what is measured is kept.
        UserError: the run has not begun, or several ranks were started.
    """
    path = run_dir(config).path
    if world.size > 1:
        raise UserError("a report is the work of one process", "start it without torchrun, or with RANKS=1")
    if not (path / "config.yaml").exists():
        raise UserError(f"{path} has no run to report on", "dist-spin run CONFIG.yaml")
    if config.report.sequences:
        try:
            measure_activations(config, world)
        except Interrupted:
            raise
        except UserError as error:  # such as a text that only GPTQ would have needed; the rest can be shown
            warn(f"activations are not measured: {error}")
    write_report(path)


def write_report(path: Path) -> None:
    """Write report.html and report.md of the run directory `path`.

    Raises:
        UserError: it is no run directory.
    """
    summary = load_run_summary(path)
    write_text(path / "report.html", html_page(summary))
    write_text(path / "report.md", markdown_page(summary))
    for line in summary.missing:
        say(f"not in the report yet: {line}")
    say(f"wrote {path / 'report.html'} and report.md")


SIDE_BY_SIDE = "side-by-side.html"  # beside the first run, by default


def write_side_by_side(paths: list[Path], output: Path | None = None) -> None:
    """Write one page, .html and .md, that shows several run directories side by side.

    Raises:
        UserError: one of them is no run directory, or `output` does not end in .html.
    """
    target = output or paths[0].absolute().parent / SIDE_BY_SIDE
    if target.suffix != ".html":
        raise UserError(f"{target} does not end in .html", "give -o NAME.html; the same as Markdown goes beside it")
    html, text = runs_pages([load_run_summary(path) for path in paths], target.absolute())
    write_text(target, html)
    write_text(target.with_suffix(".md"), text)
    say(f"wrote {target} and {target.with_suffix('.md').name}")
