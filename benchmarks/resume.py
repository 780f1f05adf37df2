"""Stop a run of a large shape by a signal, resume it in a new process group, and compare with a run that was not stopped there.

    python benchmarks/resume.py configs/shapes/llama-3-70b OUT --ranks 2 --steps 30 --stop-after 15 optimize.batch_size=2

Random weights, made on the devices. Prints the losses around the stop, resumed and undisturbed: a copy of the run that was
set back by one checkpoint takes the step before the stop and the one after it in one go. For GPU machines.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dist_spin.storage.atomic import read_lines


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stop-after", type=int, default=15)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((options.shape / "config.json").read_text())["vocab_size"]
    np.save(options.out / "tokens.npy", np.random.default_rng(0).integers(0, vocab, (64, 2048)))
    words = [f"model.path={options.shape}", "model.dummy_weights=true", f"optimize.steps={options.steps}"]
    words += [f"optimize.source=tokens:{options.out / 'tokens.npy'}", "optimize.split=all", *options.settings]

    stopped = run(options, words, "stopped", options.stop_after)
    last = int(stopped[-1]["step"])
    main, copy = options.out / "stopped", options.out / "undisturbed"
    shutil.copytree(main, copy)
    (copy / "rotations" / f"step_{last:06d}.safetensors").unlink()
    undisturbed = {line["step"]: line for line in run(options, words, "undisturbed", last + 1)}
    resumed = {line["step"]: line for line in run(options, words, "stopped", None)}
    for step in (last, last + 1):
        a, b = resumed[step]["loss"], undisturbed[step]["loss"]
        print(f"step {step}: stopped and resumed {a:.6f}, undisturbed {b:.6f}, difference {abs(a - b):.1e}")
    seconds = statistics.median(line["seconds"] for line in resumed.values())
    print(f"{len(resumed)} steps, median {seconds:.2f} s; 100 steps: {100 * seconds / 60:.1f} minutes")


def run(options: argparse.Namespace, words: list[str], name: str, stop_after: int | None) -> list[dict]:
    """Learn until the end, or send SIGTERM once step `stop_after` is logged; the lines of metrics.jsonl."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks_env = {
        "WORLD_SIZE": options.ranks,
        "LOCAL_WORLD_SIZE": options.ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "dist_spin", "optimize", *words, f"output_dir={options.out}", f"name={name}"]
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            command, env=os.environ | {k: str(v) for k, v in (ranks_env | {"RANK": r, "LOCAL_RANK": r}).items()}
        )
        for r in range(options.ranks)
    ]
    metrics = options.out / name / "metrics.jsonl"
    while stop_after is not None and all(rank.poll() is None for rank in ranks):
        lines = read_lines(metrics) if metrics.exists() else []
        if lines and lines[-1]["step"] >= stop_after:
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    codes = [rank.wait() for rank in ranks]
    lines = read_lines(metrics)
    print(f"{name}: exit codes {codes}, step {lines[-1]['step']}, {time.monotonic() - began:.0f} s", flush=True)
    return lines


if __name__ == "__main__":
    main()
