"""Where a run stands, read from its files alone, so that it works on any machine that sees them.

dist-spin status runs/quickstart
dist-spin logs runs/quickstart
dist-spin cancel runs/quickstart
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

from dist_spin.runtime.processes import process_stat
from dist_spin.runtime.progress import clock, warn
from dist_spin.runtime.slurm import cancel_jobs, job_states, output_files
from dist_spin.storage.checked_json import add_checksum, has_entries, is_mapping, is_text, read_json
from dist_spin.storage.checkpoints import checkpoints
from dist_spin.storage.metrics import read_metrics
from dist_spin.storage.results import load_results
from dist_spin.storage.run_directory import LEARNED, RunDir
from dist_spin.storage.run_records import check_is_run, read_events, read_settings
from dist_spin.storage.tensor_file import CorruptFile

WATCH_EVERY = 2.0  # seconds
LAST_LINES = 20  # of each log
FINISHED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")


def status(path: Path) -> dict[str, Any]:
    """Figures of a run: steps, loss, time left, quantised layers per variant, results.

    Raises:
        UserError: `path` is no run directory, or its config.yaml is damaged.
    """
    run = RunDir(path)
    events = run_events(path)
    if not (path / "config.yaml").exists():  # submitted, and no job has begun yet
        return {"run": str(path), "jobs": jobs_of(events), "last_event": last_event(events)}
    config = read_settings(path)
    metrics = read_metrics(path)
    steps = config.optimize.steps
    complete = (run.rotations / "final.safetensors").exists()
    step = metrics[-1]["step"] if metrics else 0
    pace = sorted(line["seconds"] for line in metrics[-20:] if "seconds" in line)
    return {
        "run": str(path),
        "optimize": {
            "step": step,
            "steps": steps,
            "complete": complete,
            "loss": metrics[-1]["loss"] if metrics else None,
            "seconds_left": 0 if complete or not pace else pace[len(pace) // 2] * (steps - step),
            "checkpoints": [number for number, _ in checkpoints(run)],
        },
        "quantize": {name: layer_states(run, name, events) for name in (LEARNED, *config.quantize.baselines)},
        "results": [add_checksum(row) for row in load_results(run, warn)],  # as they stand in results.json
        "planned_rows": next((e["rows"] for e in reversed(events) if e["event"] == "compare"), 0),
        "exports": exports(run),
        "report": (path / "report.html").exists(),
        "jobs": jobs_of(events),
        "last_event": last_event(events),
    }


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


def run_events(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's events.jsonl.

    Raises:
        UserError: `path` is no run directory.
    """
    check_is_run(path)
    return read_events(path)


def last_event(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What happened last, but for the note of time and memory with which every stage ends."""
    return next((event for event in reversed(events) if event["event"] != "stage_end"), None)


def jobs_of(events: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Every Slurm job of a run, submitted or seen at work, in that order, with its state as long as Slurm remembers it."""
    jobs: dict[str, str] = {}
    for event in events:
        if event["event"] == "submitted":
            jobs[event["job"]] = " ".join([event["stage"], *event["part"][1:]])
        elif event["event"] == "job" and (job := slurm_job_id(event.get("slurm") or {})):
            jobs.setdefault(job, f"{event['stage']} {event['part']}".strip())
    states = job_states(jobs)
    unknown = ("unknown", "")
    return [
        {"job": job, "stage": stage, "state": states.get(job, unknown)[0], "reason": states.get(job, unknown)[1]}
        for job, stage in jobs.items()
    ]


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


def slurm_job_id(variables: dict[str, str]) -> str:
    """The id of the Slurm job whose variables a stage has noted, as `squeue` shows it: `12`, `12_3` of an array, or ""."""
    if "array_job_id" in variables:
        return f"{variables['array_job_id']}_{variables.get('array_task_id', '')}"
    return variables.get("job_id", "")


def watch(path: Path, show: Callable[[dict[str, Any]], str]) -> None:
    """Print the figures again and again, in place on a terminal, until ctrl-C or until the results are there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ctrl-C ends the watching in order
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            figures = status(path)
            print(("\033[H\033[J" if sys.stdout.isatty() else "") + show(figures), flush=True)
            if figures.get("results"):
                return
            time.sleep(WATCH_EVERY)


def logs(path: Path) -> str:
    """The last lines of everything that the jobs of a run printed, oldest file first."""
    files = {file for file in RunDir(path).logs.rglob("*") if file.suffix in (".log", ".out", ".err")}
    for job in jobs_of(run_events(path)):
        files.update(output_files(job["job"]))
    texts = []
    for file in sorted((f for f in files if f.is_file() and f.stat().st_size), key=lambda f: f.stat().st_mtime):
        lines = file.read_text(errors="replace").splitlines()
        texts.append("\n".join([f"==> {file}", *lines[-LAST_LINES:]]))
    return "\n\n".join(texts) or "nothing printed yet"


def cancel(path: Path) -> str:
    """End every Slurm job of a run that has not ended; what they saved stays. Returns what was done."""
    jobs = [job["job"] for job in jobs_of(run_events(path)) if job["state"] not in (*FINISHED, "unknown")]
    cancel_jobs(jobs)
    if jobs:
        RunDir(path).event("cancelled", jobs=jobs)
    return f"cancelled {', '.join(jobs)}" if jobs else "no job of this run is waiting or running"


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


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def status_text(figures: dict[str, Any]) -> str:
    """The same for a person to read."""
    jobs = [
        f"job       {j['job']} {j['stage']}: {j['state']}"
        + (f" ({j['reason']})" if j["reason"] not in ("", "None") else "")
        for j in figures["jobs"]
    ]
    if "optimize" not in figures:
        return "\n".join([f"run       {figures['run']}, not begun", *jobs])
    o = figures["optimize"]
    loss = "" if o["loss"] is None else f", loss {o['loss']:.4f}"
    left = "complete" if o["complete"] else f"about {clock(o['seconds_left'])} left"
    lines = [f"run       {figures['run']}", f"optimize  step {o['step']} of {o['steps']}{loss}, {left}"]
    for name, states in figures["quantize"].items():
        others = [f"{state} {ranges(layers)}" for state, layers in states.items() if layers and state != "finished"]
        lines.append("; ".join([f"quantize  {name}: {len(states['finished'])} layers finished", *others]))
    measured = [r for r in figures["results"] if r.get("stage") != "compare"]
    for r in measured:
        figure = f"{r['ppl']:.3f} on {r['dataset']}" if "ppl" in r else f"{r['metric']} {r['value']:.4f} on {r['task']}"
        lines.append(f"result    {r['method']}, {r['weights']} weights: {figure}")
    if planned := figures["planned_rows"]:
        lines.append(f"compare   {len(figures['results']) - len(measured)} of {planned} rows in results.json")
    lines += [f"export    {e['format']}, {e['profile']}: {e['path']}" for e in figures["exports"]]
    if figures["report"]:
        lines.append(f"report    {Path(figures['run']) / 'report.html'}")
    lines += jobs
    if figures["last_event"]:
        event = figures["last_event"]
        lines.append(f"last      {event['event']}, {clock(time.time() - event['time'])} ago")
    return "\n".join(lines)
