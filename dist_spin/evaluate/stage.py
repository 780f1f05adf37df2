"""Measure perplexity of the full-precision model and of every quantised variant, layer by layer.

    dist-spin evaluate configs/quickstart.yaml

Perplexity is over non-overlapping windows, cross entropy in fp32, and beside it stands how far each variant's predictions are
from those of full precision (`evaluate.fidelity`). Each measurement is a file of its own
(`evaluate.measurements`), so that a second start measures only what is missing.
"""

from typing import Any

import torch

from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.evaluate.continuations import prompt_rows
from dist_spin.evaluate.fidelity import say_what_is_not_compared
from dist_spin.evaluate.perplexity import measure, measuring_tokens
from dist_spin.evaluate.tables import perplexity_table, prompt_table, task_table
from dist_spin.evaluate.targets import eval_targets, target_layer
from dist_spin.evaluate.teacher import Teacher
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import calibration_tokens
from dist_spin.runtime.distributed import World, any_rank, on_rank0
from dist_spin.runtime.progress import say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.results import public, update_results
from dist_spin.storage.run_directory import run_dir


def evaluate(config: RunConfig, world: World) -> list[dict[str, Any]]:
    """Measure every target on every source and write results.json; returns its rows.

    Raises:
        Interrupted: a signal came; what is measured is kept.
        UserError: layers are missing, or a source cannot be read.
    """
    stop = StopRequest()
    run, files = run_dir(config), open_configured_model(config)
    check_export_target(config, files.config)
    measured = eval_targets(config, files, world.device)
    quantised = [target for target in measured if target.weights != "none"]
    calibration = calibration_tokens(config, files) if quantised else torch.empty(0)
    for target in quantised:
        missing = [i for i in range(files.shape.layers) if not target_layer(run, target, i).exists()]
        if missing:
            problem = f"layer {missing[0]} of '{target.variant.name}' is not quantised"
            raise UserError(problem, "run `dist-spin quantize` first")
        target.fingerprint = layer_fingerprint(config, files, target.variant, calibration)
    teacher = Teacher(config, world, files, measured[0], stop) if config.evaluate.fidelity else None
    rows = []
    for source in config.evaluate.sources:
        tokens = measuring_tokens(config, files, source)
        for target in measured:
            row = measure(config, world, files, run, target, source, tokens, teacher, stop)
            rows.append(row)
            if any_rank(bool(stop)):
                raise Interrupted("stopped by a signal between two measurements", "the same command continues")
        if teacher is not None:
            teacher.forget(source)
    if teacher is not None:
        say_what_is_not_compared(run, [row for row in rows if row["method"] != measured[0].label])
    if config.evaluate.tasks:
        from dist_spin.evaluate.zero_shot import zero_shot  # late: the harness is an extra

        rows += zero_shot(config, world, files, run, measured, stop)
    if config.evaluate.prompts:
        rows += prompt_rows(config, world, files, run, measured, stop)
    shown = [public(row) for row in rows]
    on_rank0(lambda: update_results(run, "evaluate", shown))
    if world.is_rank0:
        print("\n".join(filter(None, [perplexity_table(shown), task_table(shown), prompt_table(shown)])))
        say(f"wrote {run.path / 'results.json'}")
    return shown
