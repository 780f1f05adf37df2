"""Kill a tiny run at random moments, start it again each time, and compare everything it wrote with an undisturbed run's.

    python benchmarks/kill_loop.py OUT --kills 1000 [--lanes 8] [--seconds 500] [--seed 0] [--log FILE]

The commands are those of a user: `run` on two ranks, `quantize` fanned out over two workers, `evaluate`, `export` and `compare`.
A random process of the one at work (the launcher, a rank, a worker, the fork server) gets SIGKILL, SIGTERM, SIGHUP or SIGINT at a
random moment of its start or its work, now and then another one right after, and the same command is started again at once,
until it is done; then everything begins anew in an empty directory, until there were enough kills. Lanes do this side by side,
each in a directory of its own. For CPUs; leaves with 1 if anything was found, and keeps OUT/faults then.
"""

import argparse
import multiprocessing
import queue
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kills.lane import Kills, Lane, Tally
from kills.tiny_run import artefacts, write_inputs

from dist_spin.runtime.processes import kill_when_parent_dies

KILLS_PER_ROUND = 40
PROGRESS_S = 15.0  # between two lines


def main() -> int:
    """Run the lanes; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--lanes", type=int, default=1, help="loops side by side; each keeps about one core busy")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end by then, with the kills so far")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and the victims; random without it")
    parser.add_argument("--log", type=Path, help="every kill and every fault goes here, too")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup; what is started here would ignore it too
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    out: Path = options.out.resolve()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    for path in [out / "undisturbed", out / "faults", *out.glob("lane-*")]:
        shutil.rmtree(path, ignore_errors=True)
    settings = write_inputs(out)
    log = (options.log or out / "kills.log").open("a", buffering=1)

    def tell(line: str, *, shown: bool) -> None:
        print(line, file=log)
        if shown:
            print(line, flush=True)

    tell(f"seed {seed}; undisturbed run", shown=True)
    reference = Lane(out / "undisturbed", settings, Kills(0), random.Random(0), tell=lambda line, tally: None)
    reference.round()
    if reference.tally.faults:
        tell(f"the undisturbed run failed: {reference.tally.faults}", shown=True)
        return 1
    seconds = ", ".join(f"{name} {duration:.0f} s" for name, duration in reference.durations.items())
    tell(f"undisturbed: {seconds}", shown=True)
    # The last round ends without kills. How long it takes with other lanes beside it is not known; twice as long is enough.
    kills = Kills(options.kills, until=end - 2 * sum(reference.durations.values()))
    total, unfinished = run_lanes(reference, kills, seed, lanes=options.lanes, end=end, tell=tell)
    for kind, fault in total.faults.items():
        tell(f"first {kind}: {fault}", shown=True)
    if unfinished:
        tell(
            f"{unfinished} lanes were in the middle of a round when the time was up; its files are not checked",
            shown=True,
        )
    tell(f"seed {seed}: {total.summary()}", shown=True)
    return 1 if total.faulty or not total.kills else 0


def run_lanes(
    reference: "Lane", kills: "Kills", seed: int, *, lanes: int, end: float, tell: Callable[..., None]
) -> tuple["Tally", int]:
    """Loops side by side until there were enough kills; what all of them found, and how many `end` (monotonic) cut off."""
    messages: multiprocessing.Queue[tuple[int, str, Tally]] = multiprocessing.Queue()
    expected = artefacts(reference.directory)
    per_round = min(KILLS_PER_ROUND, -(-kills.left() // lanes))

    def work(number: int) -> None:
        kill_when_parent_dies()  # and what it started dies with it
        lane = Lane(
            reference.directory.parent / f"lane-{number}",
            reference.settings,
            kills,
            random.Random(f"{seed} {number}"),
            tell=lambda line, tally: messages.put((number, line, tally)),
            durations=dict(reference.durations),
            per_round=per_round,
        )
        while kills.left():
            shutil.rmtree(lane.directory, ignore_errors=True)
            lane.round()
            lane.check_round(expected)

    context: Any = multiprocessing.get_context("fork")  # nothing here has threads
    processes = [context.Process(target=work, args=(number,), daemon=True) for number in range(lanes)]
    for process in processes:
        process.start()
    tallies: dict[int, Tally] = {}
    began = shown = time.monotonic()
    while time.monotonic() < end:
        running = any(process.is_alive() for process in processes)  # before the queue is found empty
        try:
            number, line, tally = messages.get(timeout=0.5)
        except queue.Empty:
            if not running:
                break
            continue
        news = tally.faults.keys() - {kind for known in tallies.values() for kind in known.faults}
        tell(f"{time.monotonic() - began:.0f} s, lane {number}: {line}", shown=bool(news))
        tallies[number] = tally
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            tell(f"{shown - began:.0f} s: {Tally.total(tallies.values()).summary()}", shown=True)
    cut_off = [process for process in processes if process.is_alive()]
    for process in cut_off:
        process.kill()
    for process in processes:
        process.join()
    total = Tally.total(tallies.values())
    for number, process in enumerate(processes):
        if process not in cut_off and process.exitcode:
            total.add_fault("lane that failed", f"lane {number} ended with code {process.exitcode}")
    return total, len(cut_off)


if __name__ == "__main__":
    sys.exit(main())
