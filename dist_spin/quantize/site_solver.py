"""Solve the linears behind one input of a decoder layer, or behind one input of each of several experts.

The linears of a site read the same, so their rows are solved as one; sites of one shape are solved together, each with its own
Hessian, which keeps a GPU busy where one of them would not. Under several ranks each rank solves some rows of every site.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dist_spin.errors import NumericsError
from dist_spin.numerics.batched_factor import prepare_all
from dist_spin.numerics.coordinate_descent import refine_all
from dist_spin.numerics.finite import dtype_remedy
from dist_spin.numerics.format_rounding import E4M3
from dist_spin.numerics.gptq import (
    Factor,
    GPTQOptions,
    QuantizedWeight,
    nearest_codes,
    output_errors,
    scales_of_all,
    solve_all,
    with_tensor_scale,
)
from dist_spin.numerics.hessian import TOKEN_CHUNK, Hessian
from dist_spin.numerics.outlier_columns import condense
from dist_spin.numerics.quantizer import ROW_TILE, dequantize_weight
from dist_spin.numerics.row_tiles import split_rows
from dist_spin.runtime.distributed import World, gather_parts, max_over_ranks, sum_over_ranks_
from dist_spin.runtime.progress import warn
from dist_spin.storage.quantized_layers import QuantizedLayer

GPU_SHARE = 1 / 16  # of a GPU's memory, for the matrices of experts that are solved together
CPU_BYTES = 2**28  # the same on a CPU, which gains nothing from it


@dataclass
class SiteSolver:
    """Quantises sites of one layer: figures, codes and what else is stored go to `result`, dequantised weights into `layer`.

    The other fields are those of `LayerQuantizer`; exact_columns: of this layer.
    """

    layer: nn.Module
    index: int
    result: QuantizedLayer
    world: World
    method: str
    hessian_dtype: torch.dtype
    clock: Callable[[str], AbstractContextManager[object]]
    exact_columns: dict[str, Tensor]
    cd_passes: int

    def solve(self, sites: list[list[str]], inputs: Iterable[Iterable[Tensor]], options: GPTQOptions) -> None:
        """Quantise the linears of `sites`, given by name and equal in shape, from what each site reads.

        Raises:
            NumericsError: the inputs are not finite.
        """
        linears = [[_linear(self.layer, role) for role in roles] for roles in sites]
        means = self._mean_hessians(inputs, [own[0].weight for own in linears])  # [sites, in, in]
        diagonals = means.diagonal(dim1=1, dim2=2)
        finite, alive = torch.stack((diagonals.isfinite().all(1), (diagonals != 0).any(1))).tolist()
        if not all(finite):
            dtype = linears[0][0].weight.dtype
            where = f"what enters {sites[finite.index(False)][0]} of layer {self.index}"
            raise NumericsError(f"{where} is not finite in {str(dtype).removeprefix('torch.')}", dtype_remedy(dtype))
        by_gptq = [self.method == "gptq" and has_input for has_input in alive]  # every rank has the same sums
        if self.method == "gptq" and self.world.is_rank0:
            for roles, has_input in zip(sites, alive, strict=True):
                if not has_input:
                    names = ", ".join(role.rpartition(".")[2] for role in roles)
                    warn(
                        f"layer {self.index}: the input of {names} is always zero, so that its codes are rounded to nearest"
                    )
        for gptq in (True, False):
            chosen = [i for i, which in enumerate(by_gptq) if which == gptq]
            if chosen:
                part = means if len(chosen) == len(sites) else means[chosen]
                self._solve([sites[i] for i in chosen], [linears[i] for i in chosen], part, options, gptq=gptq)

    def _solve(
        self, sites: list[list[str]], linears: list[list[nn.Linear]], means: Tensor, options: GPTQOptions, *, gptq: bool
    ) -> None:
        """Sites from their Hessians `means` [sites, in, in], which are overwritten: by GPTQ, or else to nearest."""
        exact = [self.exact_columns.get(roles[0]) for roles in sites]
        exact = [None if columns is None else columns.to(means.device) for columns in exact]
        carries: list[Tensor | None] = [None] * len(sites)
        factors: list[Factor] = []
        if gptq:
            with self.clock("factor"):
                for i, columns in enumerate(exact):
                    if columns is not None:
                        means[i], carries[i] = condense(means[i], columns, options.percdamp)
                factors = prepare_all(means, options)
        # Rows are independent of each other, so all linears of a site are solved as one; tiles belong to one linear each.
        tiles = [torch.cat([_whole_tiles(linear.weight) for linear in own]) for own in linears]
        stacked = torch.stack(tiles) if len(tiles) > 1 else tiles[0][None]
        del tiles
        count = stacked.shape[1]
        # Linears that engines fuse, those of a site, share a global scale.
        scaled = [with_tensor_scale(options, weight) for weight in stacked]
        start, stop = split_rows(count, self.world.size)[self.world.rank]
        rows = whole_rows = stacked[:, start:stop]
        if any(columns is not None for columns in exact):
            rows = rows.clone()
            for own_rows, columns in zip(rows, exact, strict=True):
                if columns is not None:
                    own_rows.index_fill_(1, columns, 0)
        with self.clock("solve"):
            mine = solve_all(rows, factors, scaled) if gptq else self._round(rows, scaled)
            if gptq and self.cd_passes:
                mine = refine_all(rows, mine, means, factors, options, self.cd_passes)
        dampings = [factor.damping for factor in factors] if gptq else [0.0] * len(sites)
        del factors
        with self.clock("errors"):
            errors = output_errors(rows, mine, means, options)  # [sites, rows, 3]
        kept: list[Tensor | None] = [None] * len(sites)  # values [rows, n] of the columns that stay exact
        for i, (columns, carry) in enumerate(zip(exact, carries, strict=True)):
            if columns is not None:
                values = whole_rows[i][:, columns]
                if carry is not None:
                    solution = QuantizedWeight(*(part[i] for part in mine))
                    rounded = dequantize_weight(*solution, options.group_size, carry.dtype)
                    values = (values + (rows[i].to(carry.dtype) - rounded) @ carry).to(values.dtype)
                kept[i] = _gather(values[None], count, self.world)[0]
        whole = QuantizedWeight(*(_gather(part, count, self.world) for part in mine))
        errors = _gather(errors, count, self.world)
        sums = torch.stack(
            [torch.stack([e.sum(0) for e in _of_linears(errors[i], own)]) for i, own in enumerate(linears)]
        )
        for i, figures in enumerate(sums.tolist()):
            solution = QuantizedWeight(*(part[i] for part in whole))
            self._store(sites[i], linears[i], solution, scaled[i], figures, dampings[i])
            columns, values_of_site = exact[i], kept[i]
            if columns is not None and values_of_site is not None:
                parts = _of_linears(values_of_site, linears[i])
                for role, linear, values in zip(sites[i], linears[i], parts, strict=True):
                    self.result.others |= {f"{role}.kept": columns.clone(), f"{role}.columns": values}
                    linear.weight[:, columns] = values

    def _store(
        self,
        roles: list[str],
        linears: list[nn.Linear],
        solution: QuantizedWeight,
        options: GPTQOptions,
        figures: list[list[float]],
        damping: float,
    ) -> None:
        """Keep the codes and figures of a site's linears and give those their dequantised weights.

        figures: of each linear, the sums over its rows that `output_errors` tells.
        """
        parts = zip(*(_of_linears(part, linears) for part in solution), strict=True)
        for role, linear, part, (error, rtn_error, size) in zip(roles, linears, parts, figures, strict=True):
            quantized = QuantizedWeight(*part)
            self.result.quantized_weights[role] = quantized
            self.result.bits[role] = options.bits
            if options.tensor_scale is not None:
                self.result.tensor_scales[role] = options.tensor_scale
            self.result.figures[role] = {
                "error": error / size if size else 0.0,
                "rtn_error": rtn_error / size if size else 0.0,
                "damping": damping,
            }
            dequantized = dequantize_weight(*quantized, options.group_size, linear.weight.dtype)
            linear.weight = nn.Parameter(dequantized, requires_grad=False)

    def _mean_hessians(self, inputs: Iterable[Iterable[Tensor]], weights: list[Tensor]) -> Tensor:
        """H of each site over the sequences of all ranks, [sites, in, in]."""
        means: Tensor | None = None
        for i, (read, weight) in enumerate(zip(inputs, weights, strict=True)):
            mean = self._mean_hessian(read, weight)
            if means is None:  # a single one, which may be large, is not copied
                means = mean[None] if len(weights) == 1 else mean.new_empty(len(weights), *mean.shape)
            if len(weights) > 1:
                means[i] = mean
        return cast(Tensor, means)

    def _mean_hessian(self, inputs: Iterable[Tensor], weight: Tensor) -> Tensor:
        """H over the sequences of all ranks, [in, in]."""
        hessian = Hessian(weight.shape[1], self.hessian_dtype, weight.device)
        for x in _joined(self._timed(inputs), TOKEN_CHUNK if weight.is_cuda else 1):
            with self.clock("hessian"):
                hessian.add(x)
        sum_over_ranks_(hessian.total)
        hessian.count = int(sum_over_ranks_(torch.tensor([float(hessian.count)], dtype=torch.float64)))
        with self.clock("hessian"):
            return hessian.mean()

    def _timed(self, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        source = iter(inputs)
        while True:
            with self.clock("forward"):
                x = next(source, None)
            if x is None:
                return
            yield x

    def _round(self, rows: Tensor, options: list[GPTQOptions]) -> QuantizedWeight:
        """Rows [sites, rows, in] to nearest, each site under its own options."""
        wide = rows.to(self.hessian_dtype)
        scale, zero = scales_of_all(wide, options, options[0].group_size)
        return QuantizedWeight(nearest_codes(wide, scale, zero, options[0]), scale, zero)


def experts_at_once(hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many experts of three linears [width, hidden] are solved together, with Hessians in `dtype`; the same on every rank."""
    if device.type == "cuda":
        memory = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = CPU_BYTES
    # A Hessian, its factor and what that is made from; rows as they are, in tiles, and in two more copies.
    needed = max(3 * i * i + 4 * rows * i for i, rows in ((hidden, 2 * width), (width, hidden))) * dtype.itemsize
    return max(1, -max_over_ranks(-(memory // needed)))


def equal_parts(count: int, most: int) -> list[tuple[int, int]]:
    """Ranges (start, stop) of `count` things, as few as hold at most `most` each, and nearly equal."""
    parts = -(-count // most)
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def _linear(layer: nn.Module, role: str) -> nn.Linear:
    module = layer.get_submodule(role)
    return cast(nn.Linear, getattr(module, "linear", module))


def _whole_tiles(weight: Tensor) -> Tensor:
    """weight [rows, in] with rows of zeros up to a multiple of ROW_TILE."""
    return nn.functional.pad(weight, (0, 0, 0, -len(weight) % ROW_TILE))


def _of_linears(rows: Tensor, linears: list[nn.Linear]) -> list[Tensor]:
    """The rows of each linear out of those of a site, [tiles * ROW_TILE, ...]."""
    lengths = [len(linear.weight) for linear in linears]
    whole = [length + -length % ROW_TILE for length in lengths]
    return [part[:length] for part, length in zip(rows.split(whole), lengths, strict=True)]


def _joined(inputs: Iterator[Tensor], tokens: int) -> Iterator[Tensor]:
    """Inputs [..., h] put together until there are `tokens` of them: large products keep a GPU busy."""
    waiting: list[Tensor] = []
    for x in inputs:
        waiting.append(x.flatten(0, -2))
        if sum(len(w) for w in waiting) >= tokens:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _gather(part: Tensor, rows: int, world: World) -> Tensor:
    """The rows of all ranks, in order, on every rank: [sites, own rows, ...] to [sites, rows, ...]."""
    if world.size == 1:
        return part
    if part.dtype == E4M3:  # which no backend sends
        return _gather(part.view(torch.uint8), rows, world).view(E4M3)
    row_ranges = split_rows(rows, world.size)
    longest = max(stop - start for start, stop in row_ranges)
    padded = part.new_zeros(part.shape[0], longest, *part.shape[2:])
    padded[:, : part.shape[1]] = part
    parts = gather_parts(padded)
    return torch.cat([own[:, : stop - start] for own, (start, stop) in zip(parts, row_ranges, strict=True)], 1)
