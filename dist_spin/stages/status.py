"""Where a run stands, read from its files alone, so that it works on any machine that sees them.

dist-spin status runs/quickstart
"""

import json
import time
from pathlib import Path
from typing import Any

import yaml

from dist_spin.errors import UserError
from dist_spin.progress import clock
from dist_spin.rundir import RunDir, checkpoints, read_lines


def status(path: Path) -> dict[str, Any]:
    """Figures of a run: steps, loss, time left, quantised layers per variant, results.

    Raises:
        UserError: `path` is no run directory.
    """
    run = RunDir(path)
    if not (path / "config.yaml").exists():
        raise UserError(f"{path} is no run directory (it has no config.yaml)", "give runs/NAME")
    config = yaml.safe_load((path / "config.yaml").read_text())
    metrics = read_lines(path / "metrics.jsonl")
    events = read_lines(path / "events.jsonl")
    steps = config["optimize"]["steps"]
    complete = (run.rotations / "final.safetensors").exists()
    step = metrics[-1]["step"] if metrics else 0
    pace = sorted(line["seconds"] for line in metrics[-20:])
    results = path / "results.json"
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
        "quantize": {name: _layers(run, name) for name in ("learned", *config["quantize"]["baselines"])},
        "results": json.loads(results.read_text()) if results.exists() else [],
        "last_event": events[-1] if events else None,
    }


def _layers(run: RunDir, name: str) -> list[int]:
    directory = run.layers("" if name == "learned" else name)
    return sorted(int(p.stem) for p in directory.glob("[0-9]*.safetensors")) if directory.is_dir() else []


def status_text(figures: dict[str, Any]) -> str:
    """The same for a person to read."""
    o = figures["optimize"]
    loss = "" if o["loss"] is None else f", loss {o['loss']:.4f}"
    left = "complete" if o["complete"] else f"about {clock(o['seconds_left'])} left"
    lines = [f"run       {figures['run']}", f"optimize  step {o['step']} of {o['steps']}{loss}, {left}"]
    lines += [f"quantize  {name}: {len(layers)} layers done" for name, layers in figures["quantize"].items()]
    lines += [
        f"result    {r['method']}, {r['weights']} weights: {r['ppl']:.3f} on {r['dataset']}" for r in figures["results"]
    ]
    if figures["last_event"]:
        event = figures["last_event"]
        lines.append(f"last      {event['event']}, {clock(time.time() - event['time'])} ago")
    return "\n".join(lines)
