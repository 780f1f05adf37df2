"""One kill loop in a directory of its own: start a command, kill, start it again, check; and the counts of what was found."""

import collections
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kills.tiny_run import artefacts, commands

from dist_spin.errors import EXIT_ABORTED, EXIT_HANG, EXIT_INTERRUPTED
from dist_spin.runtime.processes import dependent_environment

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
HANG_S = 90.0  # without a sign of life: no exit, and no change to any file of the run
ORPHAN_S = 5.0  # in which every process is to be gone after its launcher
# Of the kills of a round. A command that has taken fewer, because it was done, leaves the rest to those after it.
SHARES = {"run": 0.3, "quantize": 0.3, "evaluate": 0.1, "export": 0.1, "compare": 0.2}
EARLY = 1 / 3  # of a command's duration, in which half of the kills come, and starts hold most of the work
AGAIN, AGAIN_S = 0.5, 2.0  # how likely a kill is followed by another one, and within how many seconds
MARKER = "KILL_LOOP_COMMAND"  # in the environment of every process of one start of a command
PYTHON_STARTS = "init_import_site"  # in what Python itself prints if SIGINT comes before it runs any program's code
MAX_KEPT = 5  # copies of directories with a fault, for each lane


class Kills:
    """How many kills are left to all lanes together."""

    def __init__(self, number: int, until: float = float("inf")) -> None:
        """until: time.monotonic() after which there are none."""
        self._left, self._until = multiprocessing.Value("l", number), until

    def left(self) -> int:
        """How many."""
        return self._left.value if time.monotonic() < self._until else 0

    def take(self) -> bool:
        """Take one, if there is one left."""
        with self._left:
            left = self.left()
            self._left.value -= bool(left)
        return bool(left)


@dataclass
class Tally:
    """What was done and found."""

    rounds: int = 0
    starts: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)  # by signal
    victims: collections.Counter[str] = field(default_factory=collections.Counter)  # by command
    codes: collections.Counter[int] = field(default_factory=collections.Counter)
    differing: int = 0
    hangs: int = 0
    leftovers: int = 0
    orphans: int = 0
    n_faults: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # the first of each kind

    @property
    def faulty(self) -> bool:
        """Whether anything was found."""
        return bool(self.n_faults or self.differing or self.hangs or self.leftovers or self.orphans)

    @classmethod
    def total(cls, tallies: "Iterable[Tally]") -> "Tally":
        """The sum."""
        total = cls()
        for tally in tallies:
            for name, value in vars(tally).items():
                if name != "faults":
                    setattr(total, name, getattr(total, name) + value)
            total.faults = tally.faults | total.faults
        return total

    def add_fault(self, kind: str, text: str) -> None:
        """Count it, and keep what it was if it is the first of its kind."""
        self.n_faults += 1
        self.faults.setdefault(kind, text)

    def summary(self) -> str:
        """One line."""
        kills, victims = (
            ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            for counts in (self.kills, self.victims)
        )
        return (
            f"{self.kills.total()} kills ({kills}; {victims}) of {self.starts} starts in {self.rounds} rounds; "
            f"exit codes {dict(sorted(self.codes.items()))}; {self.differing} differing artefacts, "
            f"{self.hangs} hangs over {HANG_S:.0f} s, {self.leftovers} leftovers, {self.orphans} orphans, "
            f"{self.n_faults} faults"
        )


@dataclass
class Lane:
    """Rounds of all commands in one directory."""

    directory: Path
    settings: list[str]
    kills: Kills
    chance: random.Random
    tell: Callable[[str, Tally], None]
    durations: dict[str, float] = field(default_factory=dict)  # seconds of each command; what they take here at least
    per_round: int = 0
    tally: Tally = field(default_factory=Tally)
    kept: int = 0

    def round(self) -> None:
        """Every command to its end, with kills on the way while there are any left."""
        self.tally.rounds += 1
        quota = 0.0
        for command in commands(self.directory, self.settings):
            quota += SHARES[command[0]] * self.per_round
            quota, ended = self.kill_command(command, quota)
            if not ended and (code := self.start(command)):
                self.fault("failure", command, f"ended with code {code}, and nobody had killed it")
                return

    def kill_command(self, command: list[str], quota: float) -> tuple[float, bool]:
        """Start a command again and again with kills; how much of the `quota` is left, and whether the command is done."""
        code = None
        while quota >= 0.5 and self.kills.left():
            if code == 0:
                if command[0] != "compare":
                    break
                shutil.rmtree(self.directory / "compared")  # done before all kills: again from nothing
            before = self.tally.kills.total()
            code = self.start(command, int(quota + 0.5))
            quota -= self.tally.kills.total() - before
        return quota, code == 0

    def start(self, command: list[str], most: int = 0) -> int:
        """Start a command, signal at most so many of its processes, one after the other, and wait; its exit code."""
        marker, began = uuid.uuid4().hex, time.monotonic()
        self.tally.starts += 1
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory.with_suffix(".log")
        with log.open("wb") as stream:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "dist_spin", *command],
                env=os.environ | dependent_environment() | {MARKER: marker, "HF_HUB_OFFLINE": "1"},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        victims = self.kill_some(launcher, marker, command[0], most) if most else []
        after = f"after {', then '.join(victims) or 'nothing'}"
        if not self.ended(launcher):
            self.tally.hangs += 1
            self.fault("hang", command, f"shows no life for {HANG_S:.0f} s {after}")
            for pid in processes(marker):
                signal_process(pid, signal.SIGKILL)
            launcher.wait()
        code, took = launcher.returncode, time.monotonic() - began
        if code == 0:
            self.durations[command[0]] = max(took, self.durations.get(command[0], 0.0))
        self.tally.codes[code] += 1
        text = log.read_text(errors="replace")
        expected = (0, EXIT_INTERRUPTED, EXIT_ABORTED, EXIT_HANG, *(128 + n for n in SIGNALS), *(-n for n in SIGNALS))
        of_python = text.count(PYTHON_STARTS)
        if (traceback := text.count("Traceback") > of_python) or (code not in expected and not of_python):
            kind = "traceback" if traceback else f"exit code {code}"
            self.fault(kind, command, f"ended with code {code} {after}")
        end = time.monotonic() + ORPHAN_S
        while (left := processes(marker)) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            self.tally.orphans += len(left)
            self.fault("orphan", command, f"left {[command_line(pid) for pid in left]} behind {after}")
            for pid in left:
                signal_process(pid, signal.SIGKILL)
        self.tell(f"{command[0]} ended with code {code} in {took:.1f} s {after}", self.tally)
        return code

    def kill_some(self, launcher: "subprocess.Popen[bytes]", marker: str, verb: str, most: int) -> list[str]:
        """Signal a random process at a random moment, and perhaps others soon after it; in words."""
        began = time.monotonic()
        victims: list[str] = []
        latest = self.durations[verb] * (EARLY if self.chance.random() < 0.5 else 1.0)
        pause = self.chance.uniform(0, latest)
        while len(victims) < most and alive_after(launcher, pause):
            pids = processes(marker)
            if not pids or not self.kills.take():
                break
            pid, number = self.chance.choice(pids), self.chance.choice(SIGNALS)
            victims.append(f"{number.name} to {command_line(pid)} at {time.monotonic() - began:.2f} s")
            signal_process(pid, number)
            self.tally.kills[number.name] += 1
            self.tally.victims[verb] += 1
            if self.chance.random() > AGAIN:
                break
            pause = self.chance.uniform(0, AGAIN_S)
        return victims

    def ended(self, launcher: "subprocess.Popen[bytes]") -> bool:
        """Wait for the launcher as long as something happens."""
        latest, since = newest_change(self.directory), time.monotonic()
        while time.monotonic() - since < HANG_S:
            if not alive_after(launcher, 1.0):
                return True
            if (now := newest_change(self.directory)) != latest:
                latest, since = now, time.monotonic()
        return False

    def check_round(self, expected: dict[str, str]) -> None:
        """Compare what the round wrote with what it should be, and look for what should not be there."""
        found = artefacts(self.directory)
        names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        leftovers = sorted(
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.name.startswith(".") or path.name == "locks" or path.suffix in (".stale", ".corrupt", ".tmp")
        )
        self.tally.differing += len(names)
        self.tally.leftovers += len(leftovers)
        for kind, paths in (("difference", names), ("leftover", leftovers)):
            if paths:
                self.fault(kind, ["round"], f"{self.tally.rounds} ended with {paths}")
        self.tell(f"round {self.tally.rounds}: {len(names)} differing, {len(leftovers)} leftovers", self.tally)

    def fault(self, kind: str, command: list[str], what: str) -> None:
        """Note what went wrong, and keep a copy of the directory and of what the command printed."""
        kept = ""
        if self.kept < MAX_KEPT:
            target = self.directory.parent / "faults" / f"{self.directory.name}-{self.kept}"
            with contextlib.suppress(shutil.Error):  # files that went away meanwhile
                shutil.copytree(self.directory, target)
            shutil.copyfile(self.directory.with_suffix(".log"), target / "log")
            self.kept, kept = self.kept + 1, f"; see {target}"
        self.tally.add_fault(kind, f"{self.directory.name}: {command[0]} {what}{kept}")
        self.tell(f"{kind}: {command[0]} {what}{kept}", self.tally)


def alive_after(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether a process is still there after so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def processes(marker: str) -> list[int]:
    """Every living process of one start of a command, also those whose parents are gone."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARKER}={marker}".encode() in (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
            except OSError:
                continue
    return sorted(pids)


def command_line(pid: int) -> str:
    """What a process was started with, shortened."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    return " ".join(words[1:5])[:80]


def signal_process(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def newest_change(directory: Path) -> float:
    """When anything below a directory was last written, seconds."""
    newest = 0.0
    for path in directory.rglob("*"):
        try:
            newest = max(newest, path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return newest
