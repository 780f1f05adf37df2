"""Everything a report is made of, read from a run's files alone; what is not there yet is named, never an error."""

import dataclasses
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.numerics.activations import SUMMARY
from dist_spin.storage.activation_stats import SITES, load_statistics
from dist_spin.storage.atomic import parse_json
from dist_spin.storage.checked_json import has_entries, is_mapping, is_number
from dist_spin.storage.metrics import read_metrics
from dist_spin.storage.results import load_results
from dist_spin.storage.run_directory import LEARNED, RunDir
from dist_spin.storage.run_records import check_is_run, read_events, read_settings
from dist_spin.storage.tensor_file import CorruptFile, read_metadata


@dataclass
class RunSummary:
    """A run as its files show it, finished or not.

    config: the settings of config.yaml by group, and config_text: the file itself; empty before the first stage.
    events, metrics, rows: the entries of events.jsonl, metrics.jsonl and results.json that are whole.
    layers: variant -> layer -> linear -> figures of its rounding (`QuantizedLayer.figures`).
    activations: variant -> site -> figure -> [layers, ...] (`storage.activation_stats.Statistics`), measured on `tokens` tokens.
    missing: a line for each part of a full report that is not there or is damaged, with the command that makes it.
    """

    run: RunDir
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[int, dict[str, dict[str, float]]]] = field(default_factory=dict)
    activations: dict[str, dict[str, dict[str, np.ndarray[Any, Any]]]] = field(default_factory=dict)
    tokens: int = 0  # that the activations were measured on
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.get("name", self.run.path.name)

    @property
    def steps(self) -> int:
        """Learning steps that were asked for."""
        return self.config.get("optimize", {}).get("steps", 0)

    @property
    def learned(self) -> bool:
        """Whether the rotations are finished."""
        return (self.run.rotations / "final.safetensors").exists()

    @property
    def job(self) -> dict[str, Any]:
        """Where and with what the run was last worked on."""
        return next((e for e in reversed(self.events) if e["event"] == "job"), {})

    @property
    def orthogonality(self) -> dict[str, float]:
        """Largest entry of |R R^T - I| of the finished rotations, by "r1" and "r2"."""
        done: dict[str, Any] = next((e for e in reversed(self.events) if e["event"] == "done"), {})
        prefix = "orthogonality_"
        return {k.removeprefix(prefix): v for k, v in done.items() if k.startswith(prefix) and is_number(v)}

    @property
    def planned_rows(self) -> int:
        """Rows that the comparison has in the end; 0 if none was begun."""
        return next((e["rows"] for e in reversed(self.events) if e["event"] == "compare"), 0)

    @property
    def only_compared(self) -> bool:
        """Whether a comparison is all that the run was begun for; it keeps no layers, and may learn nothing of its own."""
        begun = {e["stage"] for e in self.events if e["event"] == "job" and e["stage"] != "report"}
        return "compare" in begun and begun <= {"compare", "optimize"}

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        """Rows of results.json that a stage wrote."""
        return [row for row in self.rows if row.get("stage", "evaluate") == stage]


def load_run_summary(path: Path) -> RunSummary:
    """Read a run directory.

    Raises:
        UserError: `path` is no run directory, or its config.yaml is damaged.
    """
    run = RunDir(path)
    check_is_run(path)
    summary = RunSummary(run, events=read_events(path), metrics=read_metrics(path))
    if (path / "config.yaml").exists():
        summary.config = dataclasses.asdict(read_settings(path))
        summary.config_text = (path / "config.yaml").read_text(encoding="utf-8")
    else:
        summary.missing.append("configuration: no stage has begun")
    _results(summary)
    _layers(summary)
    _activations(summary)
    _learning(summary)
    return summary


def _results(summary: RunSummary) -> None:
    summary.rows = load_results(summary.run, summary.missing.append)
    compared = len(summary.of_stage("compare"))
    if compared < summary.planned_rows:
        summary.missing.append(
            f"the comparison: {compared} of {summary.planned_rows} rows are measured (dist-spin compare)"
        )
    elif not any("ppl" in row for row in summary.rows):
        summary.missing.append("perplexities: nothing is measured yet (dist-spin evaluate)")


def _learning(summary: RunSummary) -> None:
    if not summary.metrics and not summary.only_compared:
        summary.missing.append("loss and step sizes: no step is done yet (dist-spin optimize)")
    elif summary.metrics and not summary.learned:
        summary.missing.append(f"finished rotations: step {summary.metrics[-1]['step']} of {summary.steps} is done")
    if summary.learned and not summary.orthogonality:
        summary.missing.append("orthogonality of the finished rotations: written by an earlier version")


def _layers(summary: RunSummary) -> None:
    directories = {LEARNED: summary.run.layers()}
    baselines = summary.run.path / "baselines"
    if baselines.is_dir():
        directories |= {path.name: path / "layers" for path in sorted(baselines.iterdir())}
    for variant, directory in directories.items():
        figures = {
            int(path.stem): layer
            for path in sorted(directory.glob("[0-9]*.safetensors"))
            if path.stem.isdecimal() and (layer := _rounding_figures(path))
        }
        if figures:
            summary.layers[variant] = figures
    wanted = summary.config.get("quantize", {})
    unquantized = wanted.get("method") == "none" or summary.config.get("quant", {}).get("w_bits") == 16
    if unquantized or (summary.only_compared and not summary.layers):
        return
    total = max((e["layers"] for e in summary.events if e["event"] == "quantize"), default=0)
    for variant in (*wanted.get("baselines", []), LEARNED):
        done = len(summary.layers.get(variant, {}))
        if not done or done < total:
            count = f"{done} of {total} layers are" if total else "no layer is"
            summary.missing.append(f"rounding errors ({variant}): {count} quantised (dist-spin quantize)")


def _rounding_figures(path: Path) -> dict[str, dict[str, float]] | None:
    """Figures of each linear (`QuantizedLayer.figures`) from the header of a layer's file, experts' averaged; None where it is
    damaged.
    """
    try:
        figures = parse_json((read_metadata(path) or {})["layer"])["figures"]
    except (ValueError, KeyError, TypeError):
        return None
    kinds = dict.fromkeys(("error", "rtn_error"), is_number)
    if not is_mapping(figures) or not all(is_mapping(x) and has_entries(x, kinds) for x in figures.values()):
        return None
    groups: dict[str, list[dict[str, float]]] = {}
    for role, of_role in figures.items():
        groups.setdefault(re.sub(r"(shared_expert|experts\.\d+)\.", "", role), []).append(of_role)
    if groups.keys() != set(LAYER_LINEARS):
        return None
    return {
        role: members[0]
        if len(members) == 1
        else {kind: sum(m[kind] for m in members) / len(members) for kind in kinds}
        for role, members in groups.items()
    }


def _has_experts(summary: RunSummary) -> bool:
    """Whether layers that were quantised are those of a mixture of experts."""
    last = max(summary.run.layers().glob("[0-9]*.safetensors"), default=None)  # the first ones may be dense
    try:
        return last is not None and ".experts." in (read_metadata(last) or {})["layer"]
    except (ValueError, KeyError, TypeError):  # damaged
        return False


def _activations(summary: RunSummary) -> None:
    for path in sorted((summary.run.path / "statistics").glob("*.safetensors")):
        try:
            statistics, metadata = load_statistics(path)
        except CorruptFile as error:
            summary.missing.append(f"activations ({path.stem}): {error}")
            continue
        if not statistics.done:
            continue
        summary.tokens = int(metadata["tokens"])
        summary.activations[path.stem] = {
            site: {figure: np.stack([t.numpy() for t in layers]) for figure, layers in figures.items()}
            for site, figures in statistics.layers.items()
        }
        if metadata["complete"] != "true":
            summary.missing.append(f"activations ({path.stem}): {statistics.done} layers are measured")
    command = f"dist-spin report {shlex.quote(f'{summary.run.path}/config.yaml')}"
    if not summary.activations and _has_experts(summary):
        summary.missing.append("activation statistics: those of a mixture of experts are not measured")
    elif not summary.activations:
        summary.missing.append(f"activation statistics: not measured yet ({command})")
    elif LEARNED not in summary.activations:
        when = "now" if summary.learned else "once the rotations are finished"
        summary.missing.append(f"activations after the learned rotation: {command}, {when}")


def stages(summary: RunSummary) -> list[dict[str, Any]]:
    """Time and memory of each stage that has ended once: starts, seconds over all its jobs, peak memory of a process."""
    out: dict[str, dict[str, Any]] = {}
    for event in summary.events:
        if event["event"] in ("job", "stage_end"):
            new = {"devices": "", "ranks": 0, "starts": 0, "ends": 0, "seconds": 0.0, "host": 0, "gpu": 0}
            entry = out.setdefault(event["stage"], new)
            if event["event"] == "job":
                entry["starts"] += 1
                entry["ranks"] = event["ranks"]
                entry["devices"] = ", ".join(event["devices"])
            else:
                entry["ends"] += 1
                entry["seconds"] += event["seconds"]
                entry["host"] = max(entry["host"], event["peak_host_bytes"])
                entry["gpu"] = max(entry["gpu"], event.get("peak_gpu_bytes") or 0)
    return [{"stage": stage, **entry} for stage, entry in out.items() if entry["ends"]]


def extremes(summary: RunSummary) -> list[dict[str, Any]]:
    """Per site and variant: the largest per-token peak/RMS and kurtosis of any layer, with the layer, and the mean ones."""
    largest, mean = SUMMARY.index("max"), SUMMARY.index("mean")
    out = []
    for site, title in SITES.items():
        for variant in order(summary.activations):
            figures = summary.activations[variant][site]
            entry: dict[str, Any] = {"site": title, "variant": variant}
            for figure in ("peak", "kurtosis"):
                values = figures[figure]  # [layers, 4]
                entry[figure] = float(values[:, largest].max())
                entry[f"{figure}_layer"] = int(values[:, largest].argmax())
                entry[f"{figure}_mean"] = float(values[:, mean].mean())
            out.append(entry)
    return out


def order(variants: Any) -> list[str]:
    """Variants from none over the random ones to learned."""
    known = ["none", "hadamard", "orthogonal", LEARNED]
    return sorted(variants, key=lambda name: (known.index(name) if name in known else 2.5, name))
