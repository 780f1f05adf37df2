"""Where a run stands, read from its files alone, so that it works on any machine that sees them.

dist-spin status runs/quickstart
"""

import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_spin.report.holders import Holder, holders
from dist_spin.report.jobs import is_active, jobs_of, run_events
from dist_spin.report.sequence_lengths import sequence_lengths
from dist_spin.report.status_text import is_at_work, status_text
from dist_spin.runtime.processes import process_stat
from dist_spin.runtime.progress import warn
from dist_spin.storage.checked_json import add_checksum, has_entries, is_mapping, is_text, read_json
from dist_spin.storage.checkpoints import checkpoints
from dist_spin.storage.metrics import read_metrics
from dist_spin.storage.results import load_results
from dist_spin.storage.run_directory import LEARNED, RunDir
from dist_spin.storage.run_records import read_settings
from dist_spin.storage.tensor_file import CorruptFile

WATCH_EVERY = 2.0  # seconds
AGAIN = "the same command continues"


def status(path: Path) -> dict[str, Any]:
    """Figures of a run: steps, loss, time left, quantised layers per variant, results, who is at work, what has stopped it.

    "seconds_left" is None as long as no step tells how long one takes. "stopped" is None while a process or job is at work,
    and where every stage that was started has ended well.

    Raises:
        UserError: `path` is no run directory, or its config.yaml is damaged.
    """
    run = RunDir(path)
    events = run_events(path)
    found, jobs = holders(path), jobs_of(events)
    now = {
        "jobs": jobs,
        "holders": [holder.public() for holder in found],
        "stopped": what_stopped(events, found, jobs),
        "last_event": last_event(events),
    }
    if not (path / "config.yaml").exists():  # submitted, and no job has begun yet
        return {"run": str(path), **now}
    config = read_settings(path)
    metrics = read_metrics(path)
    steps = config.optimize.steps
    complete = (run.rotations / "final.safetensors").exists()
    step = metrics[-1]["step"] if metrics else 0
    pace = sorted(line["seconds"] for line in metrics[-20:] if "seconds" in line)
    left = pace[len(pace) // 2] * (steps - step) if pace else None
    return {
        "run": str(path),
        "optimize": {
            "step": step,
            "steps": steps,
            "complete": complete,
            "loss": metrics[-1]["loss"] if metrics else None,
            "seconds_left": 0 if complete else left,
            "checkpoints": [number for number, _ in checkpoints(run)],
        },
        "quantize": {name: layer_states(run, name, events) for name in (LEARNED, *config.quantize.baselines)},
        "results": [add_checksum(row) for row in load_results(run, warn)],  # as they stand in results.json
        "planned_rows": next((e["rows"] for e in reversed(events) if e["event"] == "compare"), 0),
        "exports": exports(run),
        "report": (path / "report.html").exists(),
        "sequence_lengths": sequence_lengths(config),
        **now,
    }


def what_stopped(
    events: list[dict[str, Any]], found: list[Holder], jobs: list[dict[str, str]]
) -> dict[str, Any] | None:
    """The stage that was begun last and has not ended well, with "stage", "part", "problem" and the Unix "time" of its end.

    None if there is none, or while a process or a job is at work, which may be doing it again. The time is None of a process
    that could not note its end.
    """
    if any(holder.at_work for holder in found) or any(map(is_active, jobs)):
        return None
    latest: dict[tuple[str, str], dict[str, Any]] = {}  # (stage, part) -> its last event
    steps: dict[str, int] = {}  # stage -> the step after which it was interrupted
    for event in events:
        if event["event"] in ("job", "stage_end", "stage_failed"):
            stage = event["stage"]
            key = (stage, event.get("part") or "")
            latest.pop(key, None)
            latest[key] = event
            if event["event"] == "stage_end" and event.get("outcome") != "interrupted" and not key[1]:
                # The whole stage has done what its parts had left.
                latest = {k: e for k, e in latest.items() if k[0] != stage or k == key}
        elif event["event"] == "job_start":  # the launcher of a fan-out, which notes only its failures, is at it again
            latest.pop(("quantize", "fan-out"), None)
        elif event["event"] == "interrupted" and isinstance(event.get("step"), int):
            steps[event.get("stage", "")] = event["step"]
    for (stage, part), event in reversed(latest.items()):
        after: float | None = event["time"]
        if event["event"] == "stage_failed":
            problem = event["problem"]
        elif event["event"] == "job":
            problem, after = f"it ended before it was done: killed, crashed, or stopped early; {AGAIN}", None
        elif event.get("outcome") == "interrupted":
            where = f" after step {steps[stage]}" if stage in steps else ""
            problem = f"stopped by a signal{where}; {AGAIN}"
        else:
            continue
        return {"stage": stage, "part": part, "problem": problem, "time": after}
    return None


def exports(run: RunDir) -> list[dict[str, str]]:
    """Format, profile and directory of every finished export inside the run."""
    finished = []
    for file in sorted(run.export.glob("[!.]*/dist_spin.json")):
        try:
            sidecar = read_json(file)
        except CorruptFile as error:
            warn(f"{error}; export the model again")
            continue
        described = {"format": is_text, "profile": is_text}
        if not is_mapping(sidecar) or not has_entries(sidecar, described):
            warn(f"{file} describes no export; export the model again")
            continue
        finished.append({**{name: sidecar[name] for name in described}, "path": str(file.parent)})
    return finished


def last_event(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What happened last, but for the note of time and memory with which every stage ends."""
    return next((event for event in reversed(events) if event["event"] != "stage_end"), None)


def show_status(path: Path, *, as_json: bool = False, watching: bool = False) -> None:
    """Print where a run stands, for a person or as JSON; once, or as `watch` does.

    Raises:
        UserError: as `status`.
    """
    show = (lambda figures: json.dumps(figures, indent=1)) if as_json else status_text
    if watching:
        watch(path, show)
    else:
        print(show(status(path)))


def watch(path: Path, show: Callable[[dict[str, Any]], str]) -> None:
    """Print the figures again and again, in place on a terminal, until ctrl-C, or until `nothing_more_comes`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ctrl-C ends the watching in order
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            figures = status(path)
            print(("\033[H\033[J" if sys.stdout.isatty() else "") + show(figures), flush=True)
            if nothing_more_comes(figures):
                return
            time.sleep(WATCH_EVERY)


def nothing_more_comes(figures: dict[str, Any]) -> bool:
    """Whether the figures of `status` are of a run that has been stopped, or has results and nobody at work on more."""
    at_work = any(map(is_at_work, figures["holders"])) or any(map(is_active, figures["jobs"]))
    return bool(figures["stopped"] or (figures.get("results") and not at_work))


def layer_states(run: RunDir, name: str, events: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Layers of one variant by state: finished (has a file), running, failed (its process is gone), missing (the rest).

    Missing layers can be listed once a job has noted how many there are.
    """
    directory = run.layers(name)
    finished = {int(p.stem) for p in directory.glob("[0-9]*.safetensors")} if directory.is_dir() else set()
    started: dict[int, dict[str, Any]] = {}
    failed: set[int] = set()
    layers = 0
    for event in events:
        if event["event"] == "quantize":
            layers = event["layers"]
        elif event["event"] == "layer_start" and event["variant"] == name:
            started[event["layer"]] = event
            failed.discard(event["layer"])
        elif event["event"] in ("job_failed", "job_done"):
            failed |= {index for index in range(*event["layers"]) if index in started}
    failed |= {index for index, event in started.items() if _gone(event)}
    failed -= finished
    running = started.keys() - finished - failed
    return {
        "finished": sorted(finished),
        "running": sorted(running),
        "failed": sorted(failed),
        "missing": sorted(set(range(layers)) - finished - running - failed),
    }


def _gone(start: dict[str, Any]) -> bool:
    """Whether the process that began a layer has ended; on another machine nobody can tell from here."""
    if start["host"] != socket.gethostname():
        return False
    stat = process_stat(start["pid"])
    return stat is None or stat.ended
