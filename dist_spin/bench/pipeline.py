"""Time a whole run from a checkpoint on disk: every part by the product's own command, in processes of its own.

    dist-spin bench pipeline configs/shapes/llama-3-70b --directory /fast/bench --gpus 4
    dist-spin bench pipeline configs/shapes/llama-3-70b --directory /fast/bench --layers 8 --cache cold --json rows.json

The checkpoint has random weights; it is written to the directory once and used again. A row says how long a part took from the
start of its processes to their end, beside its floor (bench/stage_costs.py): products at the rate of a large one, weights at
the rate of a copy from pinned memory, nothing else.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dist_spin.bench.device import describe, matmul_ceiling, synchronize
from dist_spin.bench.optimize import json_config
from dist_spin.bench.random_checkpoint import TOKENS_FILE, random_checkpoint
from dist_spin.bench.stage_costs import costs
from dist_spin.config.loader import load_config
from dist_spin.config.run import LOCATION, RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.tensor_bytes import opened
from dist_spin.runtime.console import quieten_libraries
from dist_spin.storage.results import load_results
from dist_spin.storage.run_directory import RunDir, run_dir
from dist_spin.storage.run_records import read_events

GIB, GB = 1 << 30, 1e9
BLOCK = 512  # bytes that the kernel counts reading and writing in
COPIED_BYTES = 256 << 20
HEADER = (
    *("part", "cache", "GPUs", "seconds", "s/layer", "floor s", "% of floor", "GB read", "GB/s", "GB from disk"),
    *("host GiB", "GPU GiB"),
)
WIDTHS = (18, 5, 4, 8, 7, 8, 10, 8, 6, 12, 8, 7)
Start = Callable[[list[str], int, Path, tuple[str, ...]], int]  # (arguments, ranks, run directory, stages) -> exit code


def run(options: argparse.Namespace) -> int:
    """Print a row for each part as it ends; returns the exit code of the first that fails, or 0."""
    start: Start = options.start
    for word in options.settings:
        if word.partition("=")[0] in LOCATION:  # what an earlier run wrote there is removed
            raise UserError(f"bench pipeline takes no {word}", "give --directory, below which everything is written")
    options.directory = options.directory.resolve()
    gpus = options.gpus or max(1, torch.cuda.device_count())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quieten_libraries) as apart:  # gives the GPU back
        model = apart.submit(random_checkpoint, Path(options.shape), options.directory, options.layers).result()
        device, matmul, copy = apart.submit(rates).result()
    settings = run_settings(model, options, gpus)
    config = load_config(None, settings)
    shape = Shape.of(json_config(model))
    tokens = config.evaluate.max_sequences * config.evaluate.seq_len
    needed = costs(config, shape, tokens)
    print(f"{device}: {matmul / 1e12:.1f} TFLOP/s in a product, {copy / GB:.1f} GB/s from pinned memory", flush=True)
    print(_line(HEADER), flush=True)
    rows: list[dict[str, Any]] = []
    for cache in ("cold", "warm") if options.cache == "both" else (options.cache,):
        for part in options.parts:
            for old in outputs(part, run_dir(config)):
                shutil.rmtree(old, ignore_errors=True)
            if cache == "cold":
                drop_cache([model, run_dir(config).path])
            code, figures = timed(start, part, settings, gpus, config, fan_out=options.fan_out)
            if code:
                return code
            figures |= {"cache": cache, "layers": shape.layers, "floor_s": needed[part].floor(gpus, matmul, copy)}
            rows.append(figures | {"gpus": gpus, "read_bytes": needed[part].read, "device": device})
            print(_line(shown(rows[-1])), flush=True)
            print("".join(f"    {line}\n" for line in details(part, config, shape)), end="", flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    print("\n".join(["", _line(HEADER), *(_line(shown(row)) for row in rows)]))  # once more, without what stages print
    return 0


def outputs(part: str, run: RunDir) -> list[Path]:
    """Directories of an earlier benchmark that would leave the part with nothing to do."""
    made = {
        "optimize": [run.path],
        "quantize": [run.layers(), run.hidden_states()],
        "evaluate": [run.path / "evaluations"],
    }
    return made.get(part, [run.export / part])


def run_settings(model: Path, options: argparse.Namespace, gpus: int) -> list[str]:
    """The words that configure every part; those of the user win."""
    source = f"tokens:{model / TOKENS_FILE}"
    content = json_config(model)
    layers, width = content.num_hidden_layers, content.intermediate_size
    return [
        "name=pipeline",
        f"output_dir={options.directory / 'runs'}",
        f"model.path={model}",
        f"optimize.steps={options.steps}",
        f"optimize.source={source}",
        f"quantize.source={source}",
        f"evaluate.sources=[{source}]",
        "evaluate.max_sequences=8",
        f"quantize.layers_per_job={math.ceil(layers / gpus)}",
        "export.profile=r4-block",
        f"rotation.r4_block={width & -width}",  # compressed-tensors applies Hadamards of powers of two alone
        "quant.w_bits=4",
        "quant.a_bits=4",
        "quant.a_symmetric=true",  # as compressed-tensors wants it
        "quant.k_bits=4",
        "quant.v_bits=4",
        *options.settings,
    ]


def timed(
    start: Start, part: str, settings: list[str], gpus: int, config: RunConfig, *, fan_out: bool
) -> tuple[int, dict[str, Any]]:
    """Run one part; its exit code, and seconds, bytes from and to the disk, and the most memory of one of its processes."""
    stage, more, ranks = part, [], gpus
    if part == "quantize" and fan_out:
        more, ranks = ["--cluster", "local", "--workers", str(gpus)], 1
    if part in ("compressed-tensors", "hf"):
        stage, more, ranks = "export", ["--format", part], 1
    began, clock, before = time.time(), time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = start([*settings, *more, "--quiet"], ranks, run_dir(config).path, (stage,))
    seconds, after = time.monotonic() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    ends = [e for e in read_events(run_dir(config).path) if e["event"] == "stage_end" and e["time"] >= began]
    return code, {
        "part": part,
        "seconds": round(seconds, 2),
        "working_s": max((e["seconds"] for e in ends), default=0.0),
        "from_disk_bytes": (after.ru_inblock - before.ru_inblock) * BLOCK,
        "to_disk_bytes": (after.ru_oublock - before.ru_oublock) * BLOCK,
        "peak_host_bytes": max((e["peak_host_bytes"] for e in ends), default=0),
        "peak_gpu_bytes": max((e.get("peak_gpu_bytes") or 0 for e in ends), default=0),
    }


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row."""
    seconds = row["seconds"]
    return (
        row["part"],
        row["cache"],
        str(row["gpus"]),
        f"{seconds:.1f}",
        f"{seconds / row['layers']:.2f}",
        f"{row['floor_s']:.2g}",
        f"{100 * row['floor_s'] / seconds:.0f}",
        f"{row['read_bytes'] / GB:.1f}",
        f"{row['read_bytes'] / GB / seconds:.1f}",
        f"{row['from_disk_bytes'] / GB:.1f}",
        f"{row['peak_host_bytes'] / GIB:.1f}",
        f"{row['peak_gpu_bytes'] / GIB:.1f}",
    )


def details(part: str, config: RunConfig, shape: Shape) -> list[str]:
    """Lines below a row: of `evaluate`, the seconds of each model that it measured."""
    if part != "evaluate":
        return []
    rows = [row for row in load_results(run_dir(config), lambda text: None) if "seconds" in row]
    return [
        f"{row['method']}, {row['weights']} weights: {row['seconds']:.1f} s, {row['seconds'] / shape.layers:.3f} s a layer"
        for row in rows
    ]


def _line(cells: tuple[str, ...]) -> str:
    return " ".join(
        cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, WIDTHS, strict=True))
    )


def drop_cache(directories: list[Path]) -> None:
    """Have the next reader of any file below `directories` read it from the disk, unless another program has it mapped."""
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        with contextlib.suppress(OSError), opened(path) as descriptor:
            os.fsync(descriptor)  # pages that are not written yet stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def rates() -> tuple[str, float, float]:
    """The device in words, FLOP/s of a large product on it, and bytes/s of a copy from pinned memory to it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=cuda).fill_(1)
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    seconds = math.inf
    for _ in range(4):  # the first one allocates
        synchronize(device)
        began = time.monotonic()
        target.copy_(host, non_blocking=True)
        synchronize(device)
        seconds = min(seconds, time.monotonic() - began)
    return describe(device), matmul_ceiling(device)[0], COPIED_BYTES / seconds
