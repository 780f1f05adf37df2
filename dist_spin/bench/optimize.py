"""Time rotation learning on random weights of a real shape, with everything a run does, its checkpoints included.

dist-spin bench optimize configs/shapes/llama-3-8b optimize.batch_size=8 --steps 5 --json out.json
dist-spin bench optimize configs/shapes/llama-3-8b --layers 8 optimize.batch_size=1 rotation.block=32
dist-spin bench optimize configs/shapes/llama-3-8b --layers 8 optimize.batch_size=1 --baseline weight-side
dist-spin bench optimize configs/shapes/llama-3-70b --layers 8,16,32 --sequences 1,2,4      a row for each combination
torchrun --nproc_per_node 2 -m dist_spin bench optimize configs/shapes/llama-3-70b distributed.engine=deepspeed
"""

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_spin.bench import weight_side
from dist_spin.bench.device import describe, matmul_ceiling, synchronize
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.llama_form import form_config
from dist_spin.optimize.setup import TrainState, build_training, write_checkpoint
from dist_spin.optimize.train import forward_backward, learning_rate
from dist_spin.pipeline.dtype import resolve_dtype
from dist_spin.pipeline.model import model_dtype
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure, start, stop
from dist_spin.runtime.progress import say
from dist_spin.storage.checkpoints import CheckpointWriter

# What a row shows where several configurations are measured.
ROW = (
    *(
        "engine",
        "w_bits",
        "ranks",
        "layers",
        "sequences",
        "step_s",
        "forward_backward_s",
        "reduce_s",
        "cayley_s",
        "checkpoint_wait_s",
    ),
    *(
        "tokens_per_s",
        "tflops_per_device",
        "share_of_matmul",
        "peak_gib",
        "micro_batch_size",
        "offloaded_layers",
        "load_s",
    ),
)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; rank 0 prints a line per figure and writes JSON where asked. Returns the exit code."""
    alone = len(options.layers) == 1 and options.sequences in ([0], [1]) and os.environ.get("WORLD_SIZE", "1") == "1"
    if options.baseline and not (alone and (options.sequences == [1] or "optimize.batch_size=1" in options.settings)):
        raise UserError("--baseline compares one sequence on one device", "add --sequences 1, without torchrun")
    if options.baseline and load_config(None, options.settings).rotation.block:
        raise UserError(
            "the baseline rotates whole sizes, which blocks would be compared with", "leave rotation.block out"
        )
    combinations = list(itertools.product(options.sequences, options.layers))
    world = start()
    try:
        measured: list[dict[str, Any]] = []
        for sequences, layers in combinations:
            if measured and sequences != options.sequences[0]:
                torch._dynamo.reset()  # so that no graph is compiled for any number of sequences
            measured.append(measure(options, world, sequences, layers))
            if world.is_rank0 and len(combinations) > 1:
                print(" | ".join(f"{name} {measured[-1][name]}" for name in ROW), flush=True)
            release(world.device)
    finally:
        stop()
    if world.is_rank0:
        if len(combinations) == 1:
            print("\n".join(f"{name:24} {value}" for name, value in measured[0].items()))
        if options.json:
            options.json.write_text(json.dumps(measured if len(combinations) > 1 else measured[0], indent=1))
    return 0


def release(device: torch.device) -> None:
    """Give back the memory of a model that is done with, and begin a new peak."""
    gc.collect()  # sharded modules hold themselves in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(options: argparse.Namespace, world: World, sequences: int = 0, layers: int = 0) -> dict[str, Any]:
    """All figures of one configuration: seconds per step and part, tokens per second, TFLOP/s, memory.

    sequences, layers: in place of what the settings and the shape say, unless 0.
    """
    scratch = on_rank0(lambda: tempfile.mkdtemp(prefix="dist-spin-bench-"))
    directory = on_rank0(lambda: _cut(Path(options.shape), Path(scratch), layers))
    blocks = f"{scratch}/tokens.npy"
    settings = [f"model.path={directory}", "model.dummy_weights=true", f"output_dir={scratch}", *options.settings]
    settings += [f"optimize.source=tokens:{blocks}", "optimize.split=all", f"optimize.steps={options.steps + 2}"]
    config = load_config(None, [*settings, *([f"optimize.batch_size={sequences}"] if sequences else [])])
    config = resolve_dtype(config, world)
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    size = (config.optimize.batch_size, config.optimize.seq_len)
    on_rank0(lambda: np.save(blocks, np.random.default_rng(0).integers(0, vocab, size)))

    began = time.monotonic()
    train_state = build_training(config, world)
    synchronize(world.device)
    loading = time.monotonic() - began
    say(f"rank {world.rank}: built in {loading:.1f} s") if world.is_rank0 else None
    writer = CheckpointWriter(lambda state, step: write_checkpoint(train_state, state, step))
    timed = [one_step(train_state, writer) for _ in range(options.steps + 2)]
    raise_on_any_failure(writer.close)  # its thread holds the model, on every rank
    parts = {name: statistics.median(t[name] for t in timed[2:]) for name in timed[0]}
    shape = Shape.of(json_config(directory))
    tokens = config.optimize.batch_size * config.optimize.seq_len
    flop = step_flop(shape, tokens, config.optimize.seq_len, config.rotation.block) / world.size
    ceiling, ceiling_dtype = matmul_ceiling(world.device)
    levels = [getattr(layer, "level", "") for layer in train_state.model.layers]
    cuda = world.device.type == "cuda"
    figures = {
        "device": describe(world.device),
        "engine": train_state.engine.name,
        "ranks": world.size,
        "shard_ranks": train_state.engine.shards(world),
        "layers": shape.layers,
        "w_bits": config.optimize.w_bits,
        "rotation_block": config.rotation.block,
        "sequences": config.optimize.batch_size,
        "tokens_per_step": tokens,
        "load_s": round(loading, 2),
        "first_step_s": round(timed[0]["step"], 2),
        **{f"{name}_s": round(value, 4) for name, value in parts.items()},
        "tokens_per_s": round(tokens / parts["step"]),
        "tflops_per_device": round(flop / parts["step"] / 1e12, 1),
        "matmul_tflops": round(ceiling / 1e12, 1),
        "matmul_dtype": str(ceiling_dtype).removeprefix("torch."),
        "share_of_matmul": round(flop / parts["step"] / ceiling, 3),
        "overhead_share": round((parts["reduce"] + parts["cayley"] + parts["checkpoint_wait"]) / parts["step"], 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else 0.0,
        "recompute": {level: levels.count(level) for level in sorted(set(levels))},
        "offloaded_layers": train_state.offloaded,
        "micro_batch_size": train_state.micro_batch_size,
    }
    if config.optimize.w_bits < 16:  # a part of forward_backward
        began = time.monotonic()
        train_state.engine.requantize_weights(train_state.model, train_state.optimizer.rotations)
        synchronize(world.device)
        figures["requantize_s"] = round(time.monotonic() - began, 4)
    if options.baseline:
        sites, dtype = sites_for(config, shape), model_dtype(config)
        del train_state, writer
        gc.collect()
        baseline = weight_side.measure(
            json_config(directory), sites, world.device, dtype, config.optimize.seq_len, options.steps
        )
        figures |= {f"baseline_{name}": round(value, 4) for name, value in baseline.items()}
        forward_backward_s = parts["forward_backward"]
        figures["times_faster_forward_backward"] = round(
            (baseline["forward_s"] + baseline["backward_s"]) / forward_backward_s, 2
        )
        figures["times_faster_step"] = round(sum(baseline.values()) / parts["step"], 2)
    on_rank0(lambda: shutil.rmtree(scratch))
    return figures


def one_step(train_state: TrainState, writer: CheckpointWriter) -> dict[str, float]:
    """One step of the main loop, its parts timed with the device synchronised between them; seconds."""
    device, marks = train_state.world.device, [time.monotonic()]

    def mark() -> None:
        synchronize(device)
        marks.append(time.monotonic())

    forward_backward(train_state)
    mark()
    norm = train_state.optimizer.reduce_gradients()
    mark()
    train_state.optimizer.step(learning_rate(train_state.config, train_state.step), norm)
    train_state.step += 1
    mark()
    on_rank0(lambda: writer.submit(train_state.optimizer.state(), train_state.step))
    mark()
    names = ("forward_backward", "reduce", "cayley", "checkpoint_wait")
    parts = dict(zip(names, (b - a for a, b in itertools.pairwise(marks)), strict=True))
    return {**parts, "step": marks[-1] - marks[0]}


def step_flop(shape: Shape, tokens: int, seq_len: int, block: int = 0) -> float:
    """Floating-point operations that one step needs, nothing computed twice: what percentages are of.

    Forward and gradient of the activations through every weight (frozen: no weight gradient), causal attention (forward 1,
    backward 2.5 times), and per rotated site two products forward and one backward, with R1 as a whole or in blocks.
    """
    h, q = shape.hidden, shape.heads * shape.head_dim
    linears = shape.mean(lambda layer: layer.active_weights + h * layer.experts)
    attention = 2 * q * seq_len / 2 * 3.5 * 2  # per token: (QK^T and PV) over half of the positions
    rotations = 2 * 3 * 2 * h * (block or h)
    per_layer = tokens * (2 * 2 * linears + attention + rotations)
    return shape.layers * per_layer + tokens * 2 * 2 * shape.vocab * h


def json_config(directory: Path) -> Any:
    """The config.json of a shape as a transformers config, of the family that its weights are read as."""
    from transformers import AutoConfig

    return form_config(AutoConfig.from_pretrained(directory))


def _cut(source: Path, scratch: Path, layers: int) -> Path:
    """A copy of a config.json with another number of layers."""
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    target = scratch / "shape"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    return target
