"""A signal is noticed in the layer at work, also while a long measurement goes on, and the ranks leave together."""

import pytest
from ranks import Job
from tiny import tiny_run

pytestmark = pytest.mark.distributed


def measure_until_stopped(words: list[str], asked_rank: int) -> int:
    """A rank that measures; one of them was asked to stop. Returns the error's exit code, 0 without one."""
    from dist_spin.config.loader import load_config
    from dist_spin.errors import Interrupted
    from dist_spin.evaluate.perplexity import measuring_tokens, window_losses
    from dist_spin.evaluate.targets import eval_targets
    from dist_spin.pipeline.model import open_configured_model
    from dist_spin.runtime import distributed
    from dist_spin.runtime.signals import StopRequest

    config = load_config(None, words)
    world = distributed.start("cpu", 60, 1)
    files = open_configured_model(config)
    target = eval_targets(config, files, world.device)[0]
    tokens = measuring_tokens(config, files, config.evaluate.sources[0])
    stop = StopRequest()
    if world.rank == asked_rank:
        stop.name = "SIGTERM"
    try:
        window_losses(config, world, files, target, [(target.variant.sites, tokens)], "text", stop)
    except Interrupted as error:
        print(error)
        return error.exit_code
    return 0


@pytest.mark.parametrize(("asked_rank", "code"), [(1, 75), (-1, 0)])
def test_ranks_leave_a_measurement_together_after_a_layer(tmp_path, asked_rank, code):
    words = tiny_run(tmp_path, "optimize.steps=0", "quantize.method=none", "quant.w_bits=16", layers=3)
    job = Job(2, measure_until_stopped, words, asked_rank, log=tmp_path / "log")
    assert job.wait() == [code, code], job.log.read_text()
    assert job.log.read_text().count("after layer 0 of a measurement") == (2 if code else 0)


def score_until_stopped(words: list[str], asked_rank: int) -> int:
    """A rank that answers the requests of a task; one of them is asked to stop once it has opened the model."""
    from dist_spin.config.loader import load_config
    from dist_spin.errors import Interrupted
    from dist_spin.evaluate.layerwise_model import LayerwiseModel
    from dist_spin.evaluate.loglikelihood import log_likelihoods
    from dist_spin.evaluate.targets import eval_targets
    from dist_spin.pipeline.model import open_configured_model
    from dist_spin.runtime import distributed
    from dist_spin.runtime.signals import StopRequest
    from dist_spin.storage.run_directory import run_dir

    config = load_config(None, words)
    world = distributed.start("cpu", 60, 1)
    files = open_configured_model(config)
    target = eval_targets(config, files, world.device)[0]
    stop = StopRequest()

    def open_layerwise() -> LayerwiseModel:
        if world.rank == asked_rank:
            stop.name = "SIGTERM"
        return LayerwiseModel(config, world, files, run_dir(config), target)

    requests = [([5, 6, 7 + i], [9 + i, 10]) for i in range(5)]  # 3 of them for rank 0
    limits = {"layers": files.shape.layers, "max_length": 20, "token_bytes": 1}
    try:
        answers = log_likelihoods(open_layerwise, world, requests, **limits, what="task", stop=stop)
    except Interrupted as error:
        print(error)
        return error.exit_code
    assert all(total < 0 for total, _ in answers)
    return 0


@pytest.mark.parametrize(("asked_rank", "code"), [(1, 75), (-1, 0)])
def test_ranks_leave_a_task_together_within_a_layer(tmp_path, asked_rank, code):
    words = tiny_run(tmp_path, "optimize.steps=0", "quantize.method=none", "quant.w_bits=16", layers=3)
    job = Job(2, score_until_stopped, words, asked_rank, log=tmp_path / "log")
    assert job.wait() == [code, code], job.log.read_text()
    assert job.log.read_text().count("stopped by a signal: task") == (2 if code else 0)
