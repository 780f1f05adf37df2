"""FSDP2 and DeepSpeed ZeRO-3 own the same weights in the same way: one result, whichever holds them, even in turns."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, command
from safetensors.torch import load_file
from test_stopping import Runs

from dist_spin.config.distributed import DistributedConfig
from dist_spin.errors import UserError
from dist_spin.optimize.sharding.engine import choose_engine
from dist_spin.optimize.sharding.fsdp import Fsdp
from dist_spin.optimize.sharding.zero3 import Zero3
from dist_spin.runtime.distributed import World

pytestmark = pytest.mark.distributed

ZERO3 = "distributed.engine=deepspeed"


def engine_step(words: list[str], out: Path) -> None:
    """A rank that does one backward pass under the configured engine and saves to out/RANK.pt what it saw."""
    from dist_spin.config.loader import load_config
    from dist_spin.optimize.setup import build_training
    from dist_spin.optimize.train import forward_backward
    from dist_spin.runtime import distributed

    config = load_config(None, words)
    world = distributed.start("cpu", 60, 1)
    learning = build_training(config, world)
    losses = [forward_backward(learning)]
    learning.optimizer.reduce_gradients()
    seen: dict[str, Any] = {"gradient": learning.optimizer.rotations.gradient.clone()}
    # Twice more: from its third pass on, DeepSpeed fetches ahead along the order that it has recorded.
    losses += [forward_backward(learning), forward_backward(learning)]
    seen["losses"] = losses
    if config.distributed.shard_ranks:
        held = {name: p.to_local() for name, p in learning.model.named_parameters()}
        seen["held"] = {name: local.view(torch.uint8).clone() for name, local in held.items()}
        seen["whole"] = {name: p.numel() * p.element_size() for name, p in learning.model.named_parameters()}
    if config.distributed.engine == "deepspeed":
        parameters = dict(learning.model.named_parameters())
        seen["shares"] = {name: (p.ds_numel, p.ds_tensor.numel()) for name, p in parameters.items()}
        seen["mapped"] = Path("/proc/self/maps").read_text().count("dist-spin-")
        down = next(name for name in parameters if "layers.1.layer.mlp" in name and "down_proj" in name)
        parameters[down].all_gather()  # as a hook that never fired would leave it
        try:
            learning.engine.assert_sharded(learning.model, world)
        except AssertionError as error:
            seen["caught"] = str(error)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(seen, out / f"{world.rank}.pt")
    distributed.stop()


def steps(size: int, words: list[str], place: Path) -> list[dict[str, Any]]:
    job = Job(size, engine_step, [*words, f"output_dir={place}"], place / "out", log=place / "log")
    assert job.wait() == [0] * size, job.log.read_text()
    said = job.log.read_text()
    assert not any(word in said.lower() for word in ("deepspeed", "warning", "[info]")), said
    return [torch.load(place / "out" / f"{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def single(words, tmp_path_factory) -> dict[str, Any]:
    """What one process sees under FSDP2, which then shards nothing."""
    return steps(1, words, tmp_path_factory.mktemp("single"))[0]


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (1, [ZERO3]),
        (2, [ZERO3]),
        (3, [ZERO3]),
        (2, ["distributed.engine=fsdp"]),
        (2, [ZERO3, "model.dtype=float32"]),
        (3, [ZERO3, "optimize.w_bits=4", "quant.w_group_size=16", "quant.w_symmetric=false"]),
    ],
    ids=["zero3-1", "zero3-2", "zero3-3", "fsdp-2", "zero3-2-fp32", "zero3-3-w4"],
)
def test_reduced_gradients_are_those_of_a_single_process(words, single, tmp_path, size, more):
    ranks = steps(size, [*words, *more], tmp_path)
    narrow = "model.dtype=float32" in more
    if len(more) > 1:
        (tmp_path / "single").mkdir()
        single = steps(1, [*words, *more[1:]], tmp_path / "single")[0]
    for seen in ranks:
        difference = (seen["gradient"] - single["gradient"]).norm() / single["gradient"].norm()
        assert difference < (1e-6 if narrow else 1e-13)
        assert seen["losses"] == pytest.approx(single["losses"], rel=1e-6 if narrow else 1e-14)
        assert torch.equal(seen["gradient"], ranks[0]["gradient"])
    if ZERO3 in more:
        for name, (whole, _) in ranks[0]["shares"].items():
            held = [seen["shares"][name][1] for seen in ranks]
            assert max(held) <= -(-whole // size), name
            assert sum(held) >= whole, name
        assert all("layers.1.layer.mlp.down_proj" in seen["caught"] for seen in ranks)


W4 = ["optimize.w_bits=4", "quant.w_group_size=16"]


@pytest.mark.parametrize("more", [[], W4], ids=["w16", "w4"])
def test_groups_of_ranks_hold_one_copy_each_and_reduce_the_same_gradients(words, tmp_path, more):
    (tmp_path / "all").mkdir()
    every = steps(4, [*words, *more], tmp_path / "all")
    hybrid = steps(4, [*words, *more, "distributed.shard_ranks=2"], tmp_path)
    for seen in hybrid:
        assert torch.equal(seen["gradient"], hybrid[0]["gradient"])
        assert (seen["gradient"] - every[0]["gradient"]).norm() < 1e-13 * every[0]["gradient"].norm()
        assert seen["losses"] == pytest.approx(every[0]["losses"], rel=1e-14)
    for name, whole in hybrid[0]["whole"].items():
        held = [seen["held"][name] for seen in hybrid]
        assert torch.equal(held[0], held[2]), name
        assert torch.equal(held[1], held[3]), name
        assert held[0].numel() + held[1].numel() == whole, name
        assert held[1].numel() < whole, name


def test_groups_that_do_not_divide_the_ranks_are_one_line(words, tmp_path):
    job = Job(
        2, command, "optimize", *words, "distributed.shard_ranks=3", f"output_dir={tmp_path}", log=tmp_path / "log"
    )
    assert job.wait() == [2, 2], job.log.read_text()
    said = job.log.read_text()
    assert (
        said
        == "dist-spin: distributed.shard_ranks=3 does not divide 2 ranks; use a divisor, or 0 to share one copy among all\n"
    )


def test_offloaded_weights_are_mapped_files_and_give_the_same_bits(words, single, tmp_path):
    folder = tmp_path / "fast disk"
    more = [ZERO3, "distributed.offload_layers=1", f"distributed.offload_dir={folder}"]
    for seen in steps(2, [*words, *more], tmp_path):
        assert (seen["gradient"] - single["gradient"]).norm() < 1e-13 * single["gradient"].norm()
        assert seen["mapped"] == sum(name.startswith("layers.0.") for name in seen["shares"]) > 0
    assert list(folder.iterdir()) == []  # nothing is left behind


def test_a_folder_that_cannot_be_written_is_one_line(words, tmp_path):
    (tmp_path / "file").write_text("in the way")
    more = [ZERO3, "distributed.offload_layers=1", f"distributed.offload_dir={tmp_path / 'file' / 'folder'}"]
    job = Job(2, command, "optimize", *words, *more, f"output_dir={tmp_path}", log=tmp_path / "log")
    assert job.wait() == [2, 2], job.log.read_text()
    assert "folder cannot take weights (Not a directory); name a directory" in job.log.read_text()
    assert "Traceback" not in job.log.read_text()


def test_both_engines_learn_the_same_rotations(words, tmp_path):
    found = []
    for engine in ("fsdp", "deepspeed"):
        more = (f"output_dir={tmp_path}", f"name={engine}", f"distributed.engine={engine}")
        job = Job(2, command, "optimize", *words, *more, log=tmp_path / "log")
        assert job.wait() == [0, 0], job.log.read_text()
        found.append(load_file(tmp_path / engine / "rotations" / "final.safetensors"))
    for name in ("R1", "R2"):
        assert (found[0][name] - found[1][name]).abs().max() < 1e-12


@pytest.mark.slow
def test_a_run_changes_its_engine_at_every_stop(tmp_path):
    whole, changing = (Runs(tmp_path / "model", tmp_path / name) for name in ("whole", "changing"))
    for runs in (whole, changing):
        runs.log.parent.mkdir()
    expected = whole.finish(2)
    for engine, step in (("fsdp", 1), ("deepspeed", 8), ("fsdp", 16)):
        job = changing.start(2, f"distributed.engine={engine}")
        job.wait_for(lambda step=step: changing.step() >= step)
        job.signal(signal.SIGTERM, 0)
        assert job.wait() == [75, 75], changing.said()
    job = changing.start(2, ZERO3)
    assert job.wait() == [0, 0], changing.said()
    turns = [event["engine"] for event in (*changing.events("start"), *changing.events("resume"))]
    assert turns == ["fsdp", "deepspeed", "fsdp", "deepspeed"]
    assert changing.final() == expected


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="needs the package deepspeed; DS_BUILD_OPS=0 pip install") as said:
        Zero3().shard(None, World(0, 1, 0, 1, torch.device("cpu")))  # type: ignore[arg-type]  # it never gets to it
    assert "\n" not in str(said.value)


def test_the_engine_is_that_of_the_settings_or_of_accelerate(monkeypatch):
    assert isinstance(choose_engine(DistributedConfig()), Fsdp)
    with pytest.raises(UserError, match=r"offload_dir is for DeepSpeed; set distributed\.engine=deepspeed"):
        choose_engine(DistributedConfig(offload_dir="/tmp"))
    with pytest.raises(UserError, match=r"shard_ranks is for FSDP; set distributed\.engine=fsdp"):
        choose_engine(DistributedConfig(engine="deepspeed", shard_ranks=2))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert isinstance(choose_engine(DistributedConfig()), Zero3)
    assert isinstance(choose_engine(DistributedConfig(engine="fsdp")), Fsdp)
