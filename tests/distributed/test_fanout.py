"""Layers quantised by many processes: split over ranks, cut into jobs, killed at random; always the same files."""

import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Job, command
from tiny import tiny_run, write_model

from dist_spin.errors import EXIT_INTERRUPTED
from dist_spin.numerics.random_rotations import random_orthogonal
from dist_spin.report.status import status
from dist_spin.report.status_text import status_text
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.quantized_layers import load_layer
from dist_spin.storage.rotations import save_final
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.distributed

PATIENCE = 90.0
KILLS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model of four layers, one of twenty, and tokens."""
    where = tmp_path_factory.mktemp("fanout")
    write_model("gqa_tied", where / "four", layers=4)
    write_model("gqa_tied", where / "twenty", layers=20)
    np.save(where / "tokens.npy", np.random.default_rng(0).integers(3, 97, (40, 24)))
    return where


def words(place: Path, name: str, *settings: str, layers: int = 4, rotation: int = 0) -> list[str]:
    """Settings of a run that has rotations already."""
    generator = torch.Generator().manual_seed(rotation)
    run = RunDir(place / "runs" / name)
    if not (run.rotations / "final.safetensors").exists():
        r2 = torch.stack([random_orthogonal(12, generator) for _ in range(layers)])
        save_final(run, random_orthogonal(48, generator), r2, {})
    return tiny_run(
        place / "runs",
        f"name={name}",
        "model.dtype=float32",
        "rotation.r4_block=16",
        f"quantize.source=tokens:{place / 'tokens.npy'}#all",
        "quantize.seq_len=24",
        "quantize.n_sequences=20",
        *settings,
        model=place / ("four" if layers == 4 else "twenty"),
    )


def quantize(place: Path, name: str, *settings: str, size: int = 1, flags: tuple[str, ...] = (), **rest: int) -> str:
    """Run the stage to its end; what it printed."""
    job = Job(size, command, "quantize", *words(place, name, *settings, **rest), *flags, log=place / f"{name}.log")
    assert job.wait() == [0] * size, job.log.read_text()
    return job.log.read_text()


def files(place: Path, name: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((place / "runs" / name / "layers").glob("*.safetensors"))}


def codes(place: Path, name: str) -> torch.Tensor:
    found = []
    for path in sorted((place / "runs" / name / "layers").glob("*.safetensors")):
        layer, _ = load_layer(path)
        found += [layer.quantized_weights[role].codes.flatten() for role in sorted(layer.quantized_weights)]
    return torch.cat(found)


# Split over ranks


def solve_whole(place: str, out: str) -> None:
    """A rank that holds all sequences: Hessians are exact multiples of the serial ones, so only rows are split."""
    from dist_spin.model.layers import LayerRunner
    from dist_spin.model.rotated_weights import RotatedWeights
    from dist_spin.model.sites_config import Sites
    from dist_spin.model.weights import open_model
    from dist_spin.numerics.gptq import GPTQOptions
    from dist_spin.quantize.layer_quantizer import LayerQuantizer
    from dist_spin.runtime import distributed

    world = distributed.start("cpu", 60, 1)
    found = open_model(f"{place}/four", dtype=torch.float32)
    weights = RotatedWeights(found.weights, found.shape, None, (), world.device, torch.float32)
    runner = LayerRunner(found.config, Sites(), device=world.device, dtype=torch.float32, rotated=False)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 24, 48, generator=generator) for _ in range(20)]
    quantizer = LayerQuantizer(runner, world, "gptq", GPTQOptions(mse_clip=True), torch.float32, cd_passes=2)
    layer = quantizer.quantize(0, weights.layer(0), hidden)
    if world.is_rank0:
        torch.save({role: quantized._asdict() for role, quantized in layer.quantized_weights.items()}, out)
    distributed.stop()


@pytest.mark.parametrize("size", [2, 4])
def test_rows_split_over_ranks_get_the_serial_codes(place, size):
    quantized_weights = {}
    for ranks in (1, size):
        out = place / f"rows{ranks}.pt"
        job = Job(ranks, solve_whole, str(place), str(out), log=place / "rows.log")
        assert job.wait() == [0] * ranks, job.log.read_text()
        quantized_weights[ranks] = torch.load(out)
    for role, serial in quantized_weights[1].items():
        assert serial["codes"].float().std() > 1
        for part, tensor in serial.items():
            assert torch.equal(quantized_weights[size][role][part], tensor), (role, part)


@pytest.mark.parametrize(("dtype", "least"), [("float64", 1.0), ("float32", 0.999)])
def test_sequences_split_over_ranks_get_the_serial_codes(place, dtype, least):
    names = {size: f"split_{dtype}_{size}" for size in (1, 2, 4)}
    for size, name in names.items():
        quantize(place, name, f"model.dtype={dtype}", size=size)
    serial = codes(place, names[1])
    for size in (2, 4):
        same = float((codes(place, names[size]) == serial).double().mean())
        assert same >= least, f"{size} ranks: {same}"


# Cut into jobs


def test_one_job_of_all_layers_is_the_serial_run(place):
    quantize(place, "serial")
    quantize(place, "all", "quantize.layers_per_job=4")
    quantize(place, "more", "quantize.layers_per_job=9", flags=("--layers", "0:4"))
    assert len(files(place, "serial")) == 4
    assert files(place, "all") == files(place, "more") == files(place, "serial")


def test_jobs_in_any_order_on_any_ranks_are_the_run_without_jobs(place):
    setting = ("model.dtype=float64", "quantize.layers_per_job=1")
    quantize(place, "in_order", *setting)
    assert not (place / "runs" / "in_order" / "boundaries").exists()
    quantize(place, "jobs", *setting, flags=("--layers", "3:4"))  # finds nothing, makes what it needs
    quantize(place, "jobs", *setting, flags=("--layers", "0:1"))
    quantize(place, "jobs", *setting, flags=("--boundaries",))
    stored = place / "runs" / "jobs" / "boundaries"
    assert sorted(p.name for p in stored.iterdir()) == ["001", "002", "003"]
    chunk = stored / "002" / "0001.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"\0\1\0")
    said = quantize(place, "jobs", *setting, flags=("--layers", "1:3"))
    assert "0001.safetensors checksum does not match; kept as 0001.stale, computing it again" in said
    assert len(files(place, "in_order")) == 4
    assert files(place, "jobs") == files(place, "in_order")
    quantize(place, "on_ranks", *setting, size=2)
    assert torch.equal(codes(place, "on_ranks"), codes(place, "in_order"))
    # Nothing is left to do, and nothing is done.
    before = read_lines(place / "runs" / "jobs" / "events.jsonl")
    quantize(place, "jobs", *setting)
    after = read_lines(place / "runs" / "jobs" / "events.jsonl")
    assert [e["event"] for e in after[len(before) :]] == ["job", "quantize", "stage_end"]


def test_ranks_that_take_whole_ranges_write_the_same_files_and_end_together_on_a_signal_to_one(place):
    setting = ("model.dtype=float64", "quantize.layers_per_job=5")
    quantize(place, "alone", *setting, layers=20)
    apart = words(place, "apart", *setting, "quantize.parallel=layers", layers=20)
    job = Job(2, command, "quantize", *apart, log=place / "apart.log")
    run = place / "runs" / "apart"
    # One of each rank, or a second of one, which it begins when the other has done its first.
    job.wait_for(lambda: len(list(run.glob("**/layers/*.safetensors"))) > 1)
    job.signal(signal.SIGTERM, 1)
    assert job.wait() == [EXIT_INTERRUPTED] * 2, job.log.read_text()
    assert "2 ranks take whole ranges of layers: quantize.parallel says so" in job.log.read_text()
    assert 0 < len(list(run.glob("**/layers/*.safetensors"))) < 20
    quantize(place, "apart", *setting, "quantize.parallel=layers", size=2, layers=20)
    assert files(place, "apart") == files(place, "alone")
    assert not list(run.glob("**/boundaries"))
    events = [event for event in read_lines(run / "events.jsonl") if event["event"] == "layer"]
    assert len(events) == 20  # none was done twice
    assert len({event["pid"] for event in events}) == 4


def test_damaged_and_foreign_layers_are_set_aside_and_done_again(place):
    quantize(place, "damaged")
    quantize(place, "foreign", rotation=1)
    layers = place / "runs" / "damaged" / "layers"
    whole = files(place, "damaged")
    assert files(place, "foreign").keys() == whole.keys()
    first, second, third, fourth = (layers / name for name in whole)
    first.write_bytes(whole[first.name][:-100])
    middle = len(whole[second.name]) // 2
    second.write_bytes(
        whole[second.name][:middle] + bytes([whole[second.name][middle] ^ 1]) + whole[second.name][middle + 1 :]
    )
    third.write_bytes(files(place, "foreign")[third.name])
    fourth.write_bytes(whole[third.name])
    said = quantize(place, "damaged")
    assert files(place, "damaged") == whole
    assert sorted(p.name for p in layers.glob("*.stale")) == [f"00{i}.stale" for i in range(4)]
    assert said.count("doing the layer again") == 4, said
    assert f"{third} was made from another model, rotation, data or setting" in said


# Killed


class FanOut:
    """A launcher with two workers, and what its run directory tells of it."""

    def __init__(self, place: Path, name: str, *settings: str) -> None:
        self.run, self.log = RunDir(place / "runs" / name), place / f"{name}.log"
        flags = ["--cluster", "local", "--workers", "2", "--retries", str(2 * KILLS)]
        self.words = ["quantize", *flags, *settings]
        self.start()

    def start(self) -> None:
        self.launcher = Job(1, command, *self.words, log=self.log)

    @property
    def running(self) -> bool:
        return self.launcher.ranks[0].exitcode is None

    def finished(self) -> set[int]:
        return {int(path.stem) for path in self.run.layers().glob("*.safetensors")}

    def in_flight(self) -> dict[int, int]:
        """Layer -> process of what has begun and not ended."""
        begun: dict[int, int] = {}
        for event in read_lines(self.run.path / "events.jsonl"):
            if event["event"] == "layer_start":
                begun[event["layer"]] = event["pid"]
            elif event["event"] == "layer":
                begun.pop(event["layer"], None)
            elif event["event"] == "job_failed":
                begun = {layer: pid for layer, pid in begun.items() if layer not in range(*event["layers"])}
        return begun

    def wait_for_work(self) -> dict[int, int]:
        """What is in flight once something is, and something is finished."""
        end = time.monotonic() + PATIENCE
        while not (self.finished() and (flight := self.in_flight())):
            assert self.running, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.002)
        return flight


def test_killed_workers_change_nothing(place):
    setting = "quantize.layers_per_job=5"
    quantize(place, "undisturbed", setting, layers=20)
    fan = FanOut(place, "killed", *words(place, "killed", setting, layers=20))
    chance = random.Random(0)
    killed: list[int] = []
    seen: set[str] = set()
    while len(killed) < KILLS:
        flight = {layer: pid for layer, pid in fan.wait_for_work().items() if pid not in killed}
        if not flight:
            time.sleep(0.002)
            continue
        layer, pid = chance.choice(sorted(flight.items()))
        time.sleep(chance.uniform(0, 0.1))
        if fan.in_flight().get(layer) != pid:
            continue
        states = status(fan.run.path)["quantize"]["learned"]
        seen |= {state for state, layers in states.items() if layers}
        assert sorted(i for layers in states.values() for i in layers) == list(range(20))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed.append(pid)
    if fan.running:  # the launcher too, once: its workers go with it, and another takes over
        fan.launcher.signal(signal.SIGKILL, 0)
        assert fan.launcher.wait() == [-signal.SIGKILL]
        end = time.monotonic() + PATIENCE
        while (states := status(fan.run.path)["quantize"]["learned"])["running"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        text = status_text(status(fan.run.path))
        assert f"{len(states['finished'])} layers finished" in text
        fan.start()
    assert fan.launcher.wait() == [0], fan.log.read_text()
    assert seen >= {"finished", "running", "missing"}
    events = read_lines(fan.run.path / "events.jsonl")
    failures = [event for event in events if event["event"] == "job_failed"]
    assert sum(event["code"] == -signal.SIGKILL for event in failures) >= KILLS - 2  # the launcher missed its last
    done: set[int] = set()
    for event in events:
        assert event["event"] not in ("layer_start", "layer") or event["layer"] not in done, event
        if event["event"] == "layer":
            done.add(event["layer"])
    assert len(files(place, "killed")) == 20
    assert files(place, "killed") == files(place, "undisturbed")
    assert not (fan.run.path / "boundaries").exists()


def fork_server(launcher: int) -> int | None:
    """The process that a launcher's jobs are forked from."""
    tasks = Path(f"/proc/{launcher}/task").glob("*/children")
    for pid in (int(word) for task in tasks for word in task.read_text().split()):
        if b"multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def test_a_killed_fork_server_takes_its_jobs_with_it_and_is_started_again(place):
    setting = "quantize.layers_per_job=5"
    quantize(place, "undisturbed", setting, layers=20)
    fan = FanOut(place, "serverless", *words(place, "serverless", setting, layers=20))
    killed: set[int] = set()
    while len(killed) < 3 and fan.running:
        jobs = set(fan.wait_for_work().values()) if killed else set()
        server = fork_server(fan.launcher.ranks[0].pid)
        if server is None or server in killed:
            time.sleep(0.002)
            continue
        os.kill(server, signal.SIGKILL)
        killed.add(server)
        end = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in jobs):
            assert time.monotonic() < end, "jobs outlive the fork server"
            time.sleep(0.002)
    assert fan.launcher.wait() == [0], fan.log.read_text()
    assert killed
    assert "Traceback" not in fan.log.read_text()
    assert files(place, "serverless") == files(place, "undisturbed")


def test_a_job_that_cannot_succeed_is_given_up(place):
    """A mistake in the settings is not tried again, and its line is in the log."""
    given = words(place, "hopeless", "quantize.layers_per_job=2")
    (place / "runs" / "hopeless" / "layers").mkdir(parents=True)
    (place / "runs" / "hopeless" / "boundaries").write_text("in the way")
    flags = ("--cluster", "local", "--workers", "1")
    job = Job(1, command, "quantize", *given, *flags, log=place / "hopeless.log")
    assert job.wait() == [2], job.log.read_text()
    assert "job boundaries ended with code 2" in job.log.read_text()
    stopped = status(place / "runs" / "hopeless")["stopped"]
    assert (stopped["stage"], stopped["part"]) == ("quantize", "fan-out")
    assert "job boundaries ended with code 2" in stopped["problem"]
    for log in (job.log, place / "runs/hopeless/logs/quantize_boundaries.log"):
        assert not re.search("torchao|Failed to load|pytree", log.read_text())  # libraries, while they are imported
    assert len([e for e in read_lines(place / "runs/hopeless/events.jsonl") if e["event"] == "job_start"]) == 1
    assert "boundaries" in (place / "runs/hopeless/logs/quantize_boundaries.log").read_text()
