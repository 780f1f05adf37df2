"""Say before a run whether it fits, and what it will take; nothing is computed and no weights are read.

dist-spin plan CONFIG.yaml [key.sub=value ...] --gpus 4 --gpu h200
"""

import dataclasses
import json
import math
from pathlib import Path

import torch

from dist_spin.bench.plan_model import GPUS, Gpu, Hardware, Part, learning_point, parts, quantize, run_seconds
from dist_spin.bench.scaling_model import GIB
from dist_spin.bench.stage_costs import model_bytes
from dist_spin.config.run import RunConfig
from dist_spin.data import token_rows
from dist_spin.model.architecture import Shape
from dist_spin.model.weights import open_model
from dist_spin.pipeline.model import check_model_settings, check_stored_teacher, check_tuning
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.runtime.host_memory import host_bytes_free
from dist_spin.runtime.text_table import aligned

GB = 1e9
SEQUENCES = {"wikitext2": 141, "c4": 256}  # of 2048 tokens in the measured parts, by Llama 3's tokenizer, about
UNKNOWN_TEXT = 141 * 2048  # tokens that a text of unknown length is taken for
MOST_GPUS = 64
HOST_MEMORY = 512 * GIB  # of a host with GPUs, where the plan is made on another one
HEADER = ("part", "seconds", "GPU GiB", "host GiB", "disk GB", "")


def plan(
    config: RunConfig, *, gpus: int, kind: str, gpu_memory: float, host_memory: float, disk: float, as_json: bool
) -> int:
    """Print the plan of a run; returns the exit code, 0 whether it fits or not.

    Args:
        gpus: of one host; 0: those of this machine, or `distributed.nproc`. kind: of `GPUS`, "" for this machine's or an H200.
        gpu_memory, host_memory: GiB; 0: of that kind, and what is free here, or HOST_MEMORY where there are no GPUs.
        disk: GB/s at which files are written.

    Raises:
        UserError: the model's config cannot be read, or a run would be refused with these settings.
    """
    here = torch.cuda.device_count()
    gpu = GPUS[kind or kind_here() or "h200"]
    memory = gpu_memory * GIB or (gpu.memory if kind or not here else torch.cuda.mem_get_info(0)[1])
    host = host_memory * GIB or (float(host_bytes_free()) if here else HOST_MEMORY)
    hardware = Hardware(gpus or here or config.distributed.nproc, Gpu(memory, gpu.speed), host, disk * GB)
    model = open_model(config.model_path, revision=config.model.revision, dummy=True).config
    shape = Shape.of(model)
    check_tuning(config)
    check_model_settings(config, shape, model.model_type)
    check_stored_teacher(config, shape)
    sites_for(config, shape)  # which refuses groups and Hadamards that the model has no sizes for
    planned = parts(config, shape, hardware, evaluated_tokens(config))
    advice = changes(config, shape, hardware, planned)
    fits = not any(part.lacks for part in planned.values())
    if as_json:
        of_parts = {name: dataclasses.asdict(part) for name, part in planned.items()}
        print(json.dumps({"fits": fits, "gpus": hardware.gpus, "parts": of_parts, "changes": advice}, indent=1))
    else:
        print("\n".join(page(shape, hardware, planned, advice, fits=fits)))
    return 0


def kind_here() -> str:
    """The kind of this machine's GPU among `GPUS`, "" if there is none or it was not measured."""
    name = torch.cuda.get_device_name(0).lower() if torch.cuda.is_available() else ""
    return next((kind for kind in GPUS if kind in name), "")


def evaluated_tokens(config: RunConfig) -> int:
    """Tokens of all texts that `evaluate` measures; texts that would have to be read and tokenised count as UNKNOWN_TEXT."""
    e, total = config.evaluate, 0
    for source in map(config.source, e.sources):
        kind, _, rest = source.partition(":")
        tokens = SEQUENCES.get(source, 0) * 2048 or UNKNOWN_TEXT
        if kind == "tokens" and Path(rest.partition("#")[0]).is_file():
            tokens = math.prod(token_rows(rest.partition("#")[0]).shape)
        total += min(tokens, e.max_sequences * e.seq_len) if e.max_sequences else tokens
    return total


def changes(config: RunConfig, shape: Shape, hardware: Hardware, planned: dict[str, Part]) -> list[str]:
    """What to change where something does not fit, or takes longer than it must."""
    advice = []
    tokens = evaluated_tokens(config)
    lacking = {part.lacks for part in planned.values()} - {""}
    if "host memory" in lacking:
        advice.append("a host with more free memory")
    if "GPU memory" in lacking:
        more = (2**k for k in range(12) if hardware.gpus < 2**k <= MOST_GPUS)
        enough = next((n for n in more if _fit(config, shape, dataclasses.replace(hardware, gpus=n), tokens)), 0)
        advice.append(f"use {enough} GPUs" if enough else "use GPUs with more memory")
        if "quantize" in planned and planned["quantize"].lacks == "GPU memory":
            advice.append("fewer calibration tokens: a smaller quantize.n_sequences or quantize.seq_len")
            if config.quantize.tune_steps:
                advice.append("quantize.tune_steps=0: tuning holds the whole model on each GPU, however many there are")
    if "optimize" in planned and learning_point(config, shape, hardware)[1]:
        advice.append("with more GPUs no layers would have to be copied from host memory in every step")
    in_one = not (config.quantize.layers_per_job or config.quantize.tune_steps)  # which ranges cannot be tuned in
    if "quantize" in planned and hardware.gpus > 1 and in_one:
        per_gpu = math.ceil(shape.layers / hardware.gpus)
        in_jobs = dataclasses.replace(config, quantize=dataclasses.replace(config.quantize, layers_per_job=per_gpu))
        saved = planned["quantize"].seconds - quantize(in_jobs, shape, hardware).seconds
        if saved > 0:
            advice.append(
                f"quantize.layers_per_job={per_gpu}, a range for each GPU, would save {saved:.0f} s of quantize"
            )
    return advice


def _fit(config: RunConfig, shape: Shape, hardware: Hardware, tokens: int) -> bool:
    return not any(part.lacks for part in parts(config, shape, hardware, tokens).values())


def page(shape: Shape, hardware: Hardware, planned: dict[str, Part], advice: list[str], *, fits: bool) -> list[str]:
    """The plan in lines."""
    rows: list[tuple[str, ...]] = [HEADER]
    for name, part in planned.items():
        note = "; ".join([*part.notes, *([f"DOES NOT FIT into {part.lacks}"] if part.lacks else [])])
        numbers = (f"{part.seconds:.0f}", f"{part.gpu / GIB:.0f}", f"{part.host / GIB:.0f}", f"{part.disk / GB:.1f}")
        rows.append((name, *numbers, note))
    seconds, disk = run_seconds(planned), sum(part.disk for part in planned.values())
    most = (
        f"{max((getattr(p, figure) for p in planned.values()), default=0.0) / GIB:.0f}" for figure in ("gpu", "host")
    )
    rows.append(("all", f"{seconds:.0f}", *most, f"{disk / GB:.1f}", f"{seconds / 60:.1f} minutes"))
    size = f"{shape.layers} layers, {model_bytes(shape) / GB:.0f} GB in 16 bits"
    many = "s" if hardware.gpus > 1 else ""
    given = f"{hardware.gpus} GPU{many} of {hardware.gpu.memory / GIB:.0f} GiB, {hardware.host / GIB:.0f} GiB of host memory"
    return [
        f"{'fits' if fits else 'DOES NOT FIT'}: {size}, on {given}",
        "",
        *aligned(rows),
        "",
        *(f"- {line}" for line in advice),
        "Predicted, from figures measured on H100s and H200s with files in the page cache; host and disk are of one host.",
    ]
