"""Time the quantisation of one decoder layer, with random weights, exactly as the quantize stage does it.

    dist-spin bench quantize --shape 70b --sequences 128 --seq-len 2048 --out layer70b.json
    dist-spin bench quantize --shape 8b --baseline           beside a plain column loop in PyTorch
    torchrun --nproc_per_node 2 -m dist_spin bench quantize --shape 30b-a3b      ranks share the layer

Parts are timed apart: merging the rotations, forward passes, Hessians, factorisation, solve and error figures. Beside their sum
stands a floor: the products of forward passes and Hessians alone, at the rate of a large product.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_spin.bench.device import describe, matmul_ceiling, synchronize
from dist_spin.bench.options import EXPERT_SHAPES, SHAPES
from dist_spin.bench.plain_gptq import plain_gptq
from dist_spin.bench.stage_costs import forward_flop, hessian_flop
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import DummyWeights
from dist_spin.numerics.gptq import GPTQOptions, output_errors, prepare, solve
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.hessian import Hessian
from dist_spin.quantize.calibration_states import sequences_at_once
from dist_spin.quantize.layer_quantizer import PARTS, LayerQuantizer
from dist_spin.runtime import distributed

# hidden, intermediate, heads, key/value heads
MERGE, LAYER = "merge", "layer"


class Stopwatch:
    """Seconds spent in named parts; on a GPU by events, so that timing makes nothing wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time one stretch of `part`."""
        began = self._mark()
        yield
        self._marks[part].append((began, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Total per part."""
        if self.device.type != "cuda":
            return {part: sum(b - a for a, b in marks) for part, marks in self._marks.items()}
        torch.cuda.synchronize()
        return {part: sum(a.elapsed_time(b) for a, b in marks) / 1e3 for part, marks in self._marks.items()}


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; rank 0 prints its table. Returns the exit code."""
    world = distributed.start(args.device)
    try:
        figures = measure(args, world)
    finally:
        distributed.stop()
    if not world.is_rank0:
        return 0
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    return 0


def measure(args: argparse.Namespace, world: distributed.World) -> dict[str, Any]:
    """The figures: seconds per part and layer, peak memory, and the solvers side by side if asked.

    Ranks share the layer, each with its part of the sequences; seconds and memory are those of this rank.

    Raises:
        UserError: the sequences do not divide among the ranks.
    """
    if args.sequences % world.size:
        problem = f"--sequences {args.sequences} does not divide among {world.size} ranks"
        raise UserError(problem, "give a multiple of their number", shared=True)
    device, on_gpu = world.device, world.device.type == "cuda"
    config = layer_config(args.shape)
    shape = Shape.of(config)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    r4 = kronecker_factors(shape.intermediate, 0, dtype=torch.float64, device="cpu")
    rotations = initial("orthogonal" if shape.hidden < 512 else "hadamard", shape, 0)
    source = DummyWeights(config, dtype)
    weights = RotatedWeights(source, shape, rotations, r4, device, dtype)
    runner = LayerRunner(config, Sites(r4=r4), device=device, dtype=dtype, rotated=True)
    options = GPTQOptions(mse_clip=not args.no_mse_clip, group_size=args.group_size)
    runs: list[dict[str, float]] = []
    for repeat in range(args.repeats + 1):
        states = random_hidden(args.sequences, args.seq_len, shape.hidden, dtype, device)
        states = states[slice(*world.own_range(args.sequences))]
        hidden = list(torch.cat(states).split(sequences_at_once(args.seq_len, device)))
        del states
        synchronize(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        watch = Stopwatch(device)
        quantizer = LayerQuantizer(runner, world, "gptq", options, torch.float32, watch, cd_passes=args.cd_passes)
        with watch(LAYER):
            with watch(MERGE):
                merged = weights.layer(0)
            quantizer.quantize(0, merged, hidden)
        if repeat:
            runs.append(watch.seconds())
    seconds = {part: statistics.median(run[part] for run in runs) for part in (MERGE, *PARTS, LAYER)}
    tokens = args.sequences * args.seq_len // world.size
    flop = tokens * (forward_flop(shape, args.seq_len) + hessian_flop(shape))
    figures: dict[str, Any] = {
        "shape": args.shape,
        "sequences": args.sequences,
        "seq_len": args.seq_len,
        "group_size": args.group_size,
        "cd_passes": args.cd_passes,
        "mse_clip": options.mse_clip,
        "device": describe(device),
        "ranks": world.size,
        "dtype": str(dtype),
        "seconds": seconds,
        "runs": runs,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "floor_s": flop / matmul_ceiling(device)[0],
    }
    del quantizer, hidden, merged
    if args.baseline:
        figures["solver"] = compare_solvers(shape, options, device, args)
    return figures


def layer_config(name: str) -> Any:
    """A Llama or Qwen3-MoE configuration with one decoder layer of the named shape and a vocabulary too small to matter."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    hidden, intermediate, heads, kv_heads, *experts = (SHAPES | EXPERT_SHAPES)[name]
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
    }
    if not experts:
        return LlamaConfig(**sizes, intermediate_size=intermediate)
    count, per_token = experts
    routed = {"num_experts": count, "num_experts_per_tok": per_token, "norm_topk_prob": True}
    return Qwen3MoeConfig(
        **sizes, **routed, moe_intermediate_size=intermediate, head_dim=max(16, min(128, hidden // heads * 2))
    )


def random_hidden(sequences: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Hidden states [1, T, h] with a few directions in common, as a language model's have."""
    generator = torch.Generator(device).manual_seed(0)
    shared = torch.randn(16, width, generator=generator, device=device)
    out = []
    for _ in range(sequences):
        mix = torch.randn(1, length, 16, generator=generator, device=device)
        noise = torch.randn(1, length, width, generator=generator, device=device)
        out.append((mix @ shared * 0.2 + noise).to(dtype))
    return out


def compare_solvers(
    shape: Shape, options: GPTQOptions, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """down_proj solved by the product and by a plain column loop, from the same Hessian, in the same process."""
    generator = torch.Generator(device).manual_seed(1)
    hessian = Hessian(shape.intermediate, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for _ in range(-(-2 * shape.intermediate // args.seq_len)):
        hessian.add(torch.randn(args.seq_len, shape.intermediate, generator=generator, device=device, dtype=dtype))
    mean = hessian.mean()
    del hessian
    w = torch.randn(shape.hidden, shape.intermediate, generator=generator, device=device) * 0.02

    def clocked(call: Any) -> tuple[float, Any]:
        synchronize(device)
        began = time.perf_counter()
        result = call()
        synchronize(device)
        return time.perf_counter() - began, result

    def ours() -> Any:
        return solve(w, prepare(mean, options), options)

    clocked(ours)
    seconds, quantized = clocked(ours)
    plain_seconds, plain = clocked(lambda: plain_gptq(w, mean, options))
    errors, plain_errors = (output_errors(w, q, mean, options).sum(0).tolist() for q in (quantized, plain))
    return {
        "rows": shape.hidden,
        "columns": shape.intermediate,
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "speedup": plain_seconds / seconds,
        "codes_equal": float((quantized.codes == plain.codes).float().mean()),
        "error": errors[0] / errors[2],
        "plain_error": plain_errors[0] / plain_errors[2],
    }


def table(figures: dict[str, Any]) -> str:
    """The same for a person to read."""
    f, seconds = figures, figures["seconds"]
    shared = f", shared by {f['ranks']} ranks" if f["ranks"] > 1 else ""
    lines = [
        f"one {f['shape']} decoder layer, {f['sequences']} x {f['seq_len']} tokens, {f['device']}{shared}",
        *(f"  {part:8} {seconds[part]:8.3f} s" for part in (MERGE, *PARTS, LAYER)),
    ]
    lines.append(f"  floor    {f['floor_s']:8.3f} s, {100 * f['floor_s'] / seconds[LAYER]:.1f} % of the layer's")
    if f["peak_gib"] is not None:
        lines.append(f"  peak     {f['peak_gib']:8.1f} GiB")
    if "solver" in f:
        s = f["solver"]
        lines.append(
            f"down_proj {s['rows']} x {s['columns']}: {s['seconds']:.3f} s, plain column loop {s['plain_seconds']:.3f} s:"
            f" {s['speedup']:.1f} times as fast; output error {s['error']:.6f} and {s['plain_error']:.6f},"
            f" {100 * s['codes_equal']:.3f} % of codes equal"
        )
    return "\n".join(lines)
