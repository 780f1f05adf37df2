"""Kill a tiny run at random moments, start it again each time, and compare everything it wrote with an undisturbed run's.

    python benchmarks/kill_loop.py OUT --kills 100 [--seed 0]

The commands are those of a user: `run` on two ranks, `quantize` fanned out over two workers, `compare`, `export` and `evaluate`.
A random process of the one at work (the launcher, a rank, a worker, the fork server) gets SIGKILL, SIGTERM, SIGHUP or SIGINT at a
random moment, and the same command is started again at once, until it is done; then everything begins anew in an empty
directory, until there were enough kills. For CPUs; leaves with 1 if anything was found, and keeps OUT/faults then.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_spin.errors import EXIT_ABORTED, EXIT_HANG, EXIT_INTERRUPTED
from dist_spin.runtime.processes import dependent_environment

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
HANG_S = 90.0  # without a sign of life: no exit, and no change to any file of the run
ORPHAN_S = 5.0  # in which every process is to be gone after its launcher
KILLS_PER_COMMAND = 8  # in one round; then it may end
MARKER = "KILL_LOOP_COMMAND"  # in the environment of every process of one start of a command
# Files that tell of a start rather than of the run's content, and the keys of JSON files that do.
VOLATILE_FILES = ("events.jsonl", "report.html", "report.md", "README.md")
VOLATILE_FOLDERS = ("logs", "tensorboard", "locks")
VOLATILE_KEYS = ("seconds", "time", "wait_s", "bytes", "hosts", "date", "path", "checksum")  # which covers the seconds


def main() -> int:
    """Run the loop; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="of the moments and the victims; random without it")
    options = parser.parse_args()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup; what is started here would ignore it too
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    settings = write_inputs(out)
    for name in ("undisturbed", "killed", "faults"):
        shutil.rmtree(out / name, ignore_errors=True)
    print("undisturbed run", flush=True)
    reference = Loop(out / "undisturbed", settings, random.Random(0), kills_left=0)
    reference.round()
    if reference.faults:
        print(f"the undisturbed run failed: {reference.faults}")
        return 1
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    loop = Loop(
        out / "killed", settings, random.Random(seed), kills_left=options.kills, durations=list(reference.durations)
    )
    expected = artefacts(reference.directory)
    while loop.kills_left:
        shutil.rmtree(loop.directory, ignore_errors=True)
        loop.round()
        loop.check_round(expected)
        print(loop.summary(), flush=True)
    print(f"seed {seed}: {loop.summary()}")
    for fault in loop.faults:
        print(fault)
    return 1 if loop.faults or loop.differing or loop.leftovers else 0


def write_inputs(out: Path) -> list[str]:
    """A model of four layers and its tokens; returns the settings of every command."""
    model, tokens = out / "model", out / "tokens.npy"
    if not model.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    np.save(tokens, np.random.default_rng(0).integers(3, 97, (40, 24)))
    return [
        f"model.path={model}",
        "model.dtype=float32",
        "rotation.r4_block=16",
        *(f"{stage}.seq_len=24" for stage in ("optimize", "quantize", "evaluate")),
        *(f"{stage}.source=tokens:{tokens}#all" for stage in ("optimize", "quantize")),
        f"evaluate.sources=[tokens:{tokens}#all]",
        "optimize.steps=12",
        "optimize.batch_size=4",
        "quantize.n_sequences=8",
        "quantize.layers_per_job=1",
        "compare.methods=[hadamard, ours]",
        "compare.bits=[W4A4KV4]",
        "compare.weights=[gptq]",
        "compare.seeds=[0]",
        "distributed.device=cpu",
        "distributed.threads=1",
        "distributed.timeout_s=60",
    ]


def commands(directory: Path, settings: list[str]) -> list[list[str]]:
    """What a user types, in order."""
    words = [*settings, f"output_dir={directory}"]
    learned = ["optimize.steps=0", f"rotation.load={directory}/whole/rotations/R.bin", "name=fan"]
    return [
        ["run", *words, "name=whole", "distributed.nproc=2"],
        ["quantize", "--cluster", "local", "--workers", "2", "--retries", "99", *words, *learned],
        ["evaluate", *words, *learned],
        ["export", "--format", "hf", *words, *learned],
        ["compare", *words, "name=compared"],
    ]


@dataclass
class Loop:
    """Rounds of all commands in one directory, and what was found in them."""

    directory: Path
    settings: list[str]
    chance: random.Random
    kills_left: int
    durations: list[float] = field(default_factory=list)  # seconds of each command, undisturbed
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    codes: collections.Counter[int] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    hangs: int = 0
    orphans: int = 0
    rounds: int = 0

    def summary(self) -> str:
        """One line."""
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{sum(self.kills.values())} kills ({kills}) in {self.rounds} rounds; exit codes {dict(self.codes)}; "
            f"{len(self.differing)} differing artefacts, {self.hangs} hangs over {HANG_S:.0f} s, "
            f"{len(self.leftovers)} leftovers, {self.orphans} orphans, {len(self.faults)} faults"
        )

    def round(self) -> None:
        """Every command to its end, with kills on the way while there are any left."""
        self.rounds += 1
        measured = []
        for index, command in enumerate(commands(self.directory, self.settings)):
            began, code = time.monotonic(), None
            for _ in range(KILLS_PER_COMMAND):
                if self.kills_left and code != 0:
                    code = self.start_and_kill(command, self.durations[index])
            if code != 0 and (code := self.start_and_kill(command, None)):
                self.fault(command, f"ended with code {code}, and nobody had killed it")
                return
            measured.append(time.monotonic() - began)
        self.durations = self.durations or measured

    def start_and_kill(self, command: list[str], duration: float | None) -> int | None:
        """Start a command and signal one of its processes at a random moment of `duration` seconds; its exit code."""
        marker = uuid.uuid4().hex
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory.parent / f"{self.directory.name}.log"
        with log.open("wb") as stream:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "dist_spin", *command],
                env=os.environ | dependent_environment() | {MARKER: marker, "HF_HUB_OFFLINE": "1"},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        victim = ""
        if duration is not None and self.alive_after(launcher, self.chance.uniform(0, duration)):
            victim = self.kill_one(marker)
        if not self.ended(launcher):
            self.hangs += 1
            self.fault(command, f"shows no life for {HANG_S:.0f} s after {victim or 'nothing'}")
            for pid in processes(marker):
                signal_process(pid, signal.SIGKILL)
            launcher.wait()
        code = launcher.returncode
        self.codes[code] += 1
        text = log.read_text(errors="replace")
        expected = (0, EXIT_INTERRUPTED, EXIT_ABORTED, EXIT_HANG, *(128 + n for n in SIGNALS), *(-n for n in SIGNALS))
        if "Traceback" in text or code not in expected:
            self.fault(command, f"ended with code {code} after {victim or 'nothing'}")
        end = time.monotonic() + ORPHAN_S
        while (left := processes(marker)) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            self.orphans += len(left)
            self.fault(command, f"left {[command_line(pid) for pid in left]} behind after {victim or 'nothing'}")
            for pid in left:
                signal_process(pid, signal.SIGKILL)
        return code

    def kill_one(self, marker: str) -> str:
        """Signal a random process; in words."""
        pids = processes(marker)
        if not pids:
            return ""
        pid, number = self.chance.choice(pids), self.chance.choice(SIGNALS)
        victim = f"{number.name} to {command_line(pid)}"
        signal_process(pid, number)
        self.kills[number.name] += 1
        self.kills_left -= 1
        return victim

    def alive_after(self, launcher: "subprocess.Popen[bytes]", seconds: float) -> bool:
        """Whether the launcher is still there after so long."""
        try:
            launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def ended(self, launcher: "subprocess.Popen[bytes]") -> bool:
        """Wait for the launcher as long as something happens."""
        latest, since = newest_change(self.directory), time.monotonic()
        while time.monotonic() - since < HANG_S:
            if not self.alive_after(launcher, 0.1):
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
        self.differing += names
        self.leftovers += leftovers
        if names or leftovers:
            self.faults.append(f"round {self.rounds}: differing {names}, leftovers {leftovers}")
            self.keep()

    def fault(self, command: list[str], what: str) -> None:
        """Note what went wrong, and keep the evidence."""
        kept = self.keep()
        self.faults.append(f"{command[0]} {what}; see {kept}")
        print(self.faults[-1], flush=True)

    def keep(self) -> Path:
        """A copy of the directory and of what the command printed."""
        faults = self.directory.parent / "faults"
        faults.mkdir(exist_ok=True)
        kept = faults / str(len(list(faults.iterdir())))
        with contextlib.suppress(shutil.Error):  # files that went away meanwhile
            shutil.copytree(self.directory, kept)
        log = self.directory.parent / f"{self.directory.name}.log"
        shutil.copyfile(log, kept / "log")
        return kept


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


def artefacts(directory: Path) -> dict[str, str]:
    """A digest of the content of every file that does not tell of a single start."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and path.name not in VOLATILE_FILES and not {*VOLATILE_FOLDERS} & {*name.parts}:
            content = path.read_bytes()
            if path.suffix in (".json", ".jsonl"):
                lines = content.splitlines() if path.suffix == ".jsonl" else [content]
                content = json.dumps([without_volatile(json.loads(line)) for line in lines], sort_keys=True).encode()
            digests[str(name)] = hashlib.sha256(content.replace(bytes(directory), b"")).hexdigest()
    return digests


def without_volatile(value: Any) -> Any:
    """JSON without what differs from start to start."""
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if not any(word in k for word in VOLATILE_KEYS)}
    if isinstance(value, list):
        return [without_volatile(item) for item in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
