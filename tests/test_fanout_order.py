"""A fan-out starts each range of layers as soon as what enters it is stored, not when the whole pass is done."""

from collections.abc import Iterable

from tiny import tiny_run

from dist_spin.config.loader import load_config
from dist_spin.launch.fanout import SignalForwarder, open_tasks, run_tasks
from dist_spin.launch.jobs import Task
from dist_spin.launch.slurm_pipeline import grouped
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.stage import prepare_jobs, quantize_variants
from dist_spin.runtime import distributed


class SlowPass:
    """Does the jobs in this process, one each time it is waited for; the pass of hidden states takes two of them."""

    slots = 8

    def __init__(self, jobs: list[QuantizeJob]) -> None:
        self.jobs, self.running, self.started, self.seen = jobs, [], [], []
        self.first_states_stored = False

    def start(self, task: Task) -> None:
        self.running.append(task)
        self.started.append(task.name)

    def wait(self, seconds: float) -> Iterable[tuple[Task, int]]:
        self.seen.append(set(self.started))
        if not self.first_states_stored:
            self.first_states_stored = True
            self.jobs[0].hidden_states.make([2])
            return
        task = self.running.pop(0)
        layers = (task.layers.start, task.layers.stop) if task.layers else None
        quantize_variants(self.jobs, layers, hidden_states_only=not task.layers)
        yield task, 0

    def stop(self) -> None:
        raise AssertionError("nothing failed")


def test_ranges_start_when_their_states_are_there(tmp_path, restored_process):
    settings = ("name=run", "optimize.steps=0", "rotation.r4_block=16", "quantize.layers_per_job=2")
    config = load_config(None, tiny_run(tmp_path, *settings, layers=6))
    world = distributed.start("cpu", threads=1)
    try:
        jobs = prepare_jobs(config, world)
        executor = SlowPass(jobs)
        run_tasks(
            [Task(["--hidden-states"], range(0)), *open_tasks(jobs)], executor, jobs, 0, SignalForwarder(executor)
        )
    finally:
        distributed.stop()
    assert executor.seen[:3] == [
        {"boundaries", "000-002"},
        {"boundaries", "000-002", "002-004"},
        {"boundaries", "000-002", "002-004", "004-006"},
    ]
    assert len(executor.started) == 4
    assert len(list((tmp_path / "run" / "layers").glob("*.safetensors"))) == 6


def test_a_slurm_task_of_several_ranks_gets_a_range_for_each():
    tenth = [(start, start + 8) for start in range(0, 80, 8)]
    assert grouped(tenth, 1) == tenth
    assert grouped(tenth, 4) == [(0, 24), (24, 48), (48, 80)]
    assert grouped(tenth, 8) == [(0, 40), (40, 80)]
    assert grouped(tenth, 16) == [(0, 80)]
    assert grouped([(0, 8), (16, 24), (24, 30)], 8) == [(0, 8), (16, 30)]  # what lies between them is finished
    assert grouped([], 8) == []
