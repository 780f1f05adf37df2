"""Time inference on the low-bit kernels that libraries ship: what rotation costs, and what fewer bits gain.

    dist-spin bench inference configs/shapes/llama-3-8b --json out.json
    dist-spin bench inference configs/shapes/llama-3-8b --device cpu --batches 1 --layers 1 --prefill 128
    dist-spin bench inference configs/shapes/llama-3-8b --kernels humming-w4a8 --r4-block 128

Every kernel (see bench/linear_kernels.py) runs the same decoder layers with and without the online Hadamards R3 (queries and
keys) and R4 (input of down_proj), or with R4 in blocks as engines serve it: decoding, one token per sequence against a full
context, and prefill of whole sequences.
Weights are random and distinct in every layer; a model is its layers, and lm_head. On a GPU each measurement is a CUDA graph,
so that launches cost what they cost a server. What this machine lacks is skipped with a line.
"""

import argparse
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.bench.decoder import Decoder, empty_cache, layer_sizes, random_weight
from dist_spin.bench.device import clock, describe
from dist_spin.bench.hadamard_routes import LIBRARY, Transform, routes
from dist_spin.bench.linear_kernels import make, relative_error
from dist_spin.bench.optimize import json_config
from dist_spin.bench.options import KERNELS
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.numerics.hadamard import NoHadamard, hadamard_matrix
from dist_spin.numerics.hadamard_transform import kronecker_apply, kronecker_factors
from dist_spin.runtime.progress import Progress, say
from dist_spin.runtime.text_table import aligned
from dist_spin.storage.atomic import write_json

PLAIN = "none"


@dataclass(frozen=True)
class Rotation:
    """The online Hadamards of a pass: R3 and R4 as transforms, or R4 within the kernel, in blocks of `in_kernel` channels."""

    r3: Transform | None = None
    r4: Transform | None = None
    in_kernel: int = 0


def block_hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Transform:
    """x [..., n] turned by a normalised Hadamard matrix in blocks of `block` channels, as one dense product."""
    matrix = (hadamard_matrix(block).double() * block**-0.5).to(device, dtype)
    return lambda x: (x.view(-1, block) @ matrix).view(x.shape)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print its table; returns the exit code."""
    figures: dict[str, Any] = {}
    for figures in measure(options):
        if options.json:  # after every kernel, so that a run cut short leaves what it had
            write_json(options.json, figures)
    print(table(figures))
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All figures so far, after every kernel: passes (rows), linear kernels, Hadamards side by side, what was skipped.

    Raises:
        UserError: an option names what is not there.
    """
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and device.type != "cuda":
        raise UserError("--device cuda, but there is no CUDA device", "leave it out")
    batches = _numbers("--batches", options.batches)
    kernels = list(dict.fromkeys(["bf16", *options.kernels.split(",")]))
    if unknown := set(kernels) - set(KERNELS):
        raise UserError(f"--kernels names {min(unknown)!r}", f"use some of {', '.join(KERNELS)}")
    shape = Shape.of(json_config(Path(options.shape)))
    largest = shape.intermediate & -shape.intermediate
    if options.r4_block and options.r4_block not in [2**power for power in range(1, largest.bit_length())]:
        raise UserError(
            f"--r4-block is {options.r4_block}", f"give a power of two up to {largest}, which divides the model's sizes"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(shape, device, batches, options)
    layers = options.layers or (shape.layers if device.type == "cuda" else 1)
    figures: dict[str, Any] = {
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "shape": dataclasses.asdict(shape),
        "layers_with_own_weights": layers,
        "context": options.context,
        "prefill": options.prefill,
        "compiled": bench.compiled,
        "hadamard": [],
        "head_ms": bench.head(),
    }
    for name in kernels:
        bench.kernel(name, layers)
        for row in bench.rows:
            _compare(row, bench.rows, figures["head_ms"], shape.layers)
        yield {**figures, "kernels": bench.kernels, "rows": bench.rows, "skipped": bench.skipped}
    figures["hadamard"] = bench.side_by_side()  # last: its compiled routes take longest to compile
    yield {**figures, "kernels": bench.kernels, "rows": bench.rows, "skipped": bench.skipped}


class Bench:
    """The measurements of one shape on one device; rows, kernels and what was skipped gather here."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        batches: list[int],
        options: argparse.Namespace,
    ) -> None:
        self.shape, self.device, self.batches = shape, device, batches
        self.context, self.prefill, self.limit = options.context, options.prefill, options.limit
        self.clock = functools.partial(clock, device=device, at_least=options.seconds)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.most_tokens = max(batches) * max(1, options.prefill)
        self.token_counts = sorted({*batches, *(batch * max(1, options.prefill) for batch in batches)})
        self.r4_block = options.r4_block
        self.rows: list[dict[str, Any]] = []
        self.kernels: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.deadline = time.monotonic() + options.budget if options.budget else math.inf
        compile_asked = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
        self.compiled = compile_asked and self._compiles()
        self.fuse = functools.cache(self._compile if self.compiled else lambda function: function)

    def _compiles(self) -> bool:
        """Whether torch.compile works here; it needs Triton and a C compiler."""
        try:
            torch.compile(torch.square)(torch.ones(8, device=self.device))
        except Exception as failure:
            self.skip("torch.compile", failure)
            return False
        return True

    def _out_of_time(self, what: str) -> bool:
        """Whether the time is up, so that `what` is left out."""
        out_of_time = time.monotonic() > self.deadline
        if out_of_time:
            self.skip(what, "over --budget")
        return out_of_time

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled for any sizes; 1 is always a case of its own, so a function is compiled several times."""
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(function, dynamic=True)

    def skip(self, what: str, why: object) -> None:
        """Note and say in one line what is not measured."""
        lines = str(why).strip().splitlines() or [type(why).__name__]
        self.skipped[what] = lines[0][:160]
        say(f"skipped {what}: {self.skipped[what]}")

    def random(self, *size: int) -> Tensor:
        """Seeded normal numbers."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    def kernel(self, name: str, layers: int) -> None:
        """Every pass of the layers on one kernel, without and with the Hadamards."""
        if self._out_of_time(name):
            return
        progress = Progress(f"{name}: pass", len(self._passes()) * len(self.rotations))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            errors = self._errors(name)
            decoder = Decoder(self.shape, layers, name, self.device, self.fuse, self.token_counts)
        except Exception as failure:  # a library may fail in any way on a device it was not made for
            self.skip(name, failure)
            return
        self.kernels[name] = {**errors, "gib_per_layer": decoder.weight_bytes / layers / 2**30}
        for rotation, transforms in self.rotations.items():
            if transforms.in_kernel and not hasattr(decoder.layers[0].down, "rotated"):
                continue
            per_token = 0.0  # seconds of the prefill before this one
            for phase, batch in self._passes():
                tokens = batch * (1 if phase == "decode" else self.prefill)
                what = f"{name}, rotation {rotation}, {phase}, batch {batch}"
                progress.advance(what)
                if self._out_of_time(what):
                    continue
                if phase == "prefill" and per_token * tokens > self.limit:
                    self.skip(what, f"a pass would take {per_token * tokens:.0f} s, over --limit {self.limit:g}")
                    continue
                try:
                    seconds = self._pass(decoder, phase, batch, transforms)
                except Exception as failure:
                    self.skip(what, failure)
                    continue
                if phase == "prefill":
                    per_token = seconds / tokens
                row = {"phase": phase, "batch": batch, "tokens": tokens, "kernel": name, "rotation": rotation}
                self.rows.append({**row, "layer_ms": seconds / layers * 1e3})

    def _passes(self) -> list[tuple[str, int]]:
        return [
            (phase, batch) for phase in ("decode", *(["prefill"] if self.prefill else [])) for batch in self.batches
        ]

    @functools.cached_property
    def rotations(self) -> dict[str, Rotation]:
        """By name: none; with --r4-block R4 in blocks, else R3 and R4 as Kronecker products and by the library if installed."""
        rotations = {PLAIN: Rotation()}
        if self.r4_block:
            blocks = block_hadamard(self.r4_block, self.dtype, self.device)
            rotations[f"R4 in blocks of {self.r4_block}"] = Rotation(r4=blocks)
            rotations["R4 in the kernel"] = Rotation(in_kernel=self.r4_block)
            return rotations
        try:
            r3, r4 = [routes(width, self.dtype, self.device, None)[0] for width in self._widths().values()]
        except NoHadamard as error:
            self.skip("rotation", error)
            return rotations
        rotations["kronecker"] = Rotation(r3["kronecker"], r4["kronecker"])
        if LIBRARY in r4:
            rotations[LIBRARY] = Rotation(r3[LIBRARY], r4[LIBRARY])
        return rotations

    def _widths(self) -> dict[str, int]:
        return {"R3": self.shape.head_dim, "R4": self.shape.intermediate}

    def _errors(self, name: str) -> dict[str, float]:
        """Relative error of the kernel on one projection's size, and where it turns its input; whether it works shows here."""
        weight = random_weight(layer_sizes(self.shape)["down" if self.r4_block else "o"], 0, self.device)
        tokens = 64
        kernel = make(name, weight, self.fuse, [tokens, *self.token_counts])
        errors = {"error": relative_error(kernel, weight, tokens)}
        if self.r4_block and hasattr(kernel, "rotated"):
            turn = block_hadamard(self.r4_block, torch.float32, self.device)
            errors["rotated_error"] = relative_error(kernel, weight, tokens, turn, self.r4_block)
        return errors

    def _pass(self, decoder: Decoder, phase: str, batch: int, rotation: Rotation) -> float:
        layers = len(decoder.layers)
        turns = rotation.r3, rotation.r4, rotation.in_kernel
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the graph before this one held
        if phase == "decode":
            cache = empty_cache(self.shape, layers, batch, self.context, self.device, self.dtype)
            x = self.random(batch, 1, self.shape.hidden)
            return self.clock(lambda: decoder.run(x, cache, *turns))
        x = self.random(batch, self.prefill, self.shape.hidden)
        return self.clock(lambda: decoder.run(x, None, *turns))

    @torch.no_grad()
    def head(self) -> dict[int, float]:
        """Milliseconds of lm_head in 16 bits on the last token of each sequence, by batch."""
        weight = random_weight((self.shape.vocab, self.shape.hidden), 5, self.device)
        out = {}
        for batch in self.batches:
            x = self.random(batch, self.shape.hidden).to(torch.bfloat16)
            out[batch] = self.clock(functools.partial(torch.matmul, x, weight.T)) * 1e3
        return out

    @torch.no_grad()
    def side_by_side(self) -> list[dict[str, Any]]:
        """Microseconds of R3 and R4 by every route, on as many rows as a layer has tokens (R3: times its heads)."""
        if self.r4_block:  # whole Hadamards are not in question
            return []
        rows = []
        fuse = self.fuse if self.compiled else None
        for site, width in self._widths().items():
            try:
                transforms, missing = routes(width, self.dtype, self.device, fuse)
            except NoHadamard as error:
                self.skip(site, error)
                continue
            for route, why in missing.items():
                self.skip(f"{site} by {route}", why)
            heads = self.shape.heads + self.shape.kv_heads if site == "R3" else 1
            exact = kronecker_factors(width, dtype=torch.float64, device=self.device)
            sizes = [
                tokens for tokens in dict.fromkeys([1, max(self.batches), self.prefill, self.most_tokens]) if tokens
            ]
            for route, transform in transforms.items():
                for tokens in sizes:
                    x = self.random(tokens * heads, width)
                    sample = x[:64].double()
                    what = f"{site} by {route}, {tokens} tokens"
                    if self._out_of_time(what):
                        continue
                    try:
                        off = (transform(x)[:64].double() - kronecker_apply(sample, exact)).norm() / sample.norm()
                        us = self.clock(functools.partial(transform, x)) * 1e6
                    except Exception as failure:
                        self.skip(what, failure)
                        continue
                    row = {"site": site, "width": width, "tokens": tokens, "route": route, "us": us}
                    rows.append(row if route == "copy" else {**row, "error": float(off)})
        return rows


def _numbers(option: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"{option} is {text!r}", "write whole numbers above 0 with commas between them, such as 1,16")
    return sorted({int(word) for word in words})


def _compare(row: dict[str, Any], rows: list[dict[str, Any]], head_ms: dict[int, float], layers: int) -> None:
    """Add the whole model's time, what the rotation costs and what is gained over bf16 without one, where both are there."""

    def of(kernel: str) -> dict[str, Any] | None:
        key = (row["phase"], row["batch"], kernel, PLAIN)
        return next((r for r in rows if (r["phase"], r["batch"], r["kernel"], r["rotation"]) == key), None)

    model_ms = row["layer_ms"] * layers + head_ms[row["batch"]]
    row |= {"model_ms": model_ms, "tokens_per_s": row["tokens"] / model_ms * 1e3}
    if (plain := of(row["kernel"])) is not None:
        row["rotation_cost"] = row["layer_ms"] / plain["layer_ms"] - 1
    if (base := of("bf16")) is not None:
        row["speed_over_bf16"] = (base["layer_ms"] * layers + head_ms[row["batch"]]) / model_ms


def table(figures: dict[str, Any]) -> str:
    """The figures for a person to read."""
    shape = figures["shape"]
    out = [
        f"{figures['device']}, {figures['threads']} threads; hidden {shape['hidden']}, intermediate {shape['intermediate']}, "
        f"{shape['layers']} layers ({figures['layers_with_own_weights']} with weights of their own); "
        f"decoding at context {figures['context']}, prefill of {figures['prefill']} tokens"
    ]
    rows, rotations = figures["rows"], list(dict.fromkeys(r["rotation"] for r in figures["rows"]))
    lines: list[tuple[str, ...]] = [
        (
            "pass",
            "batch",
            "kernel",
            "layer ms",
            "model tokens/s",
            "over bf16",
            *(f"with {name}" for name in rotations if name != PLAIN),
        )
    ]
    for phase, batch, kernel in dict.fromkeys((r["phase"], r["batch"], r["kernel"]) for r in sorted(rows, key=_order)):
        by_rotation = {
            r["rotation"]: r for r in rows if (r["phase"], r["batch"], r["kernel"]) == (phase, batch, kernel)
        }
        words = [phase, str(batch), kernel]
        if PLAIN in by_rotation:
            words += [
                f"{by_rotation[PLAIN]['layer_ms']:.4f}",
                f"{by_rotation[PLAIN]['tokens_per_s']:.4g}",
                _gain(by_rotation[PLAIN]),
            ]
        else:
            words += ["", "", ""]
        lines.append((*words, *(_cost(by_rotation.get(name)) for name in rotations if name != PLAIN)))
    out += [
        "",
        "With: what the Hadamards add to a layer, and the whole model's speed over bf16 without them.",
        *aligned(lines),
    ]
    hadamards = figures["hadamard"]
    names = list(dict.fromkeys(h["route"] for h in hadamards))
    lines = [("us of", "width", "tokens", *names)]
    for site, width, tokens in dict.fromkeys((h["site"], h["width"], h["tokens"]) for h in hadamards):
        us = {h["route"]: f"{h['us']:.1f}" for h in hadamards if (h["site"], h["tokens"]) == (site, tokens)}
        lines.append((site, str(width), str(tokens), *(us.get(name, "") for name in names)))
    out += ["", *aligned(lines), ""]
    for name, kernel in figures["kernels"].items():
        rotated = f", with R4 in the kernel {kernel['rotated_error']:.1e}" if "rotated_error" in kernel else ""
        out.append(
            f"{name}: {kernel['gib_per_layer']:.4f} GiB a layer, relative error of a product {kernel['error']:.1e}{rotated}"
        )
    return "\n".join(out + [f"skipped {what}: {why}" for what, why in figures["skipped"].items()])


def _order(row: dict[str, Any]) -> tuple[str, int]:
    return row["phase"], row["batch"]


def _gain(row: dict[str, Any]) -> str:
    return f"{row['speed_over_bf16']:.2f}" if "speed_over_bf16" in row else ""


def _cost(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    cost = f"{row['rotation_cost']:+.1%}" if "rotation_cost" in row else f"{row['layer_ms']:.4f} ms"
    return f"{cost}  {_gain(row)}".rstrip()
