"""Mixtures of experts on several ranks, or in jobs: sharded experts give the gradients of one process, shared GPTQ its codes."""

import pytest
import torch
from families import FAMILIES
from ranks import Job, command
from safetensors.torch import load_file
from test_engines import steps
from tiny import tiny_run, write_model

from dist_spin.storage.atomic import read_lines

pytestmark = pytest.mark.distributed

MODEL = FAMILIES["qwen3-30b-a3b (2048, 768)"]  # whose 8 experts of 24 rows do not divide among 5 ranks
ZERO3 = "distributed.engine=deepspeed"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    model = write_model(MODEL, tmp_path_factory.mktemp("model"))
    return tiny_run(model, "optimize.batch_size=5", "optimize.scales=true", "optimize.clips=true", model=model)


@pytest.fixture(scope="module")
def single(words, tmp_path_factory):
    return steps(1, words, tmp_path_factory.mktemp("single"))[0]


@pytest.mark.parametrize(("size", "more"), [(2, []), (5, []), (2, [ZERO3])], ids=["fsdp-2", "fsdp-5", "zero3-2"])
def test_sharded_experts_give_the_gradients_of_one_process(words, single, tmp_path, size, more):
    for seen in steps(size, [*words, *more], tmp_path):
        assert (seen["gradient"] - single["gradient"]).norm() < 1e-13 * single["gradient"].norm()
        assert seen["losses"] == pytest.approx(single["losses"], rel=1e-14)


JOBS = ("--cluster", "local", "--workers", "2")


@pytest.mark.parametrize("ranges", [[], ["quantize.layers_per_job=1"]], ids=["each layer shared", "a layer each"])
def test_two_ranks_or_jobs_quantise_experts_as_one_does(words, tmp_path, ranges):
    found = []
    for name, size, flags in [("one", 1, ()), ("ranks", 2, ()), *([("jobs", 1, JOBS)] if ranges else [])]:
        more = (f"output_dir={tmp_path}", f"name={name}", "optimize.steps=0", "optimize.scales=false", *ranges)
        log = tmp_path / f"{name}.log"
        job = Job(size, command, "quantize", *flags, *words, *more, "optimize.clips=false", log=log)
        assert job.wait() == [0] * size, log.read_text()
        assert ("2 ranks take whole ranges of layers" in log.read_text()) == (size == 2 and bool(ranges))
        events = read_lines(tmp_path / name / "events.jsonl")
        assert len({event["pid"] for event in events if event["event"] == "layer"}) == (
            2 if ranges and name != "one" else 1
        )
        (*_, last) = sorted((tmp_path / name / "layers").rglob("*.safetensors"))
        found.append(load_file(last))
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, tensor in found[0].items():
            if name.endswith("codes"):
                assert torch.equal(tensor, other[name]), name
