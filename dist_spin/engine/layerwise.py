"""Quantise one decoder layer from the hidden states that enter it; under several ranks each holds some sequences.

Input statistics are shared per site (q, k, v see one input; gate and up one), and every later site sees the earlier ones
already quantised (Frantar et al. 2022). Each part of the layer runs once per sequence.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_spin.distributed import World, sum_over_ranks_
from dist_spin.layer_files import QuantizedLayer
from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM
from dist_spin.model.layers import LayerRunner
from dist_spin.numerics.gptq import GPTQOptions, Hessian, Solution, output_errors, prepare, solve, split_rows
from dist_spin.numerics.quantizer import dequantize_weight, quantize_weight, weight_scales


class LayerQuantizer:
    """Quantises layers with one set of options.

    hessian_dtype: fp32, or fp64 where results must not depend on how sequences are split over ranks.
    """

    def __init__(
        self, runner: LayerRunner, world: World, method: str, options: GPTQOptions, hessian_dtype: torch.dtype
    ) -> None:
        self.runner, self.world, self.method, self.options = runner, world, method, options
        self.hessian_dtype = hessian_dtype

    @torch.no_grad()
    def quantize(self, index: int, weights: dict[str, Tensor], hidden: list[Tensor]) -> QuantizedLayer:
        """Quantise layer `index` and move `hidden` (this rank's sequences, each [1, T, h]) through it, in place.

        weights: the layer's parameters by their names within it, rotations merged.
        """
        self._layer = self.runner.build(index, weights)
        self._result = QuantizedLayer(
            {},
            {k: w for k, w in weights.items() if not (k.endswith(".weight") and k[: -len(".weight")] in LAYER_LINEARS)},
            {},
            self.options.bits,
            self.options.symmetric,
            self.options.group_size,
        )
        attention: Any = self._layer.self_attn
        mlp: Any = self._layer.mlp
        attention_norm, mlp_norm = getattr(self._layer, ATTENTION_NORM), getattr(self._layer, MLP_NORM)

        linears = ("q_proj", "k_proj", "v_proj")
        self._solve([f"self_attn.{n}" for n in linears], lambda: (attention_norm(h) for h in hidden))
        output, attention.o_proj = attention.o_proj, attention.o_proj.front
        inputs = [self._attend(index, attention_norm(h)) for h in hidden]  # what o_proj reads
        attention.o_proj = output
        self._solve(["self_attn.o_proj"], lambda: inputs)
        for i, x in enumerate(inputs):
            hidden[i] = hidden[i] + output.linear(x)
        del inputs

        self._solve(["mlp.gate_proj", "mlp.up_proj"], lambda: (mlp_norm(h) for h in hidden))
        down, mlp.down_proj = mlp.down_proj, mlp.down_proj.front
        inputs = [mlp(mlp_norm(h)) for h in hidden]  # what down_proj reads
        mlp.down_proj = down
        self._solve(["mlp.down_proj"], lambda: inputs)
        for i, x in enumerate(inputs):
            hidden[i] = hidden[i] + down.linear(x)
        return self._result

    def _attend(self, index: int, normed: Tensor) -> Tensor:
        attention: Any = self._layer.self_attn
        return attention(hidden_states=normed, **self.runner.context(index, normed))[0]

    def _solve(self, roles: list[str], inputs: Callable[[], Any]) -> None:
        """Quantise the linears of one site and put their dequantised weights into the layer."""
        linears = {role: _linear(self._layer, role) for role in roles}
        first = next(iter(linears.values())).weight
        hessian = Hessian(first.shape[1], self.hessian_dtype, first.device)
        for x in inputs():
            hessian.add(x)
        sum_over_ranks_(hessian.total)
        hessian.count = int(sum_over_ranks_(torch.tensor([float(hessian.count)], dtype=torch.float64)))
        mean = hessian.mean()
        factor = prepare(mean, self.options) if self.method == "gptq" else None
        for role, linear in linears.items():
            w = linear.weight
            start, stop = split_rows(len(w), self.world.size)[self.world.rank]
            rows = w[start:stop]
            mine = self._round(rows) if factor is None else solve(rows, factor, self.options)
            errors = output_errors(rows, mine, mean, self.options) if len(rows) else mean.new_zeros(3).double()
            error, rtn_error, size = sum_over_ranks_(errors).tolist()
            solution = Solution(*(_gather(part, len(w), self.world) for part in mine))
            self._result.solutions[role] = solution
            self._result.figures[role] = {
                "error": error / size,
                "rtn_error": rtn_error / size,
                "damping": factor.damping if factor is not None else 0.0,
            }
            linear.weight = nn.Parameter(
                dequantize_weight(solution.codes, solution.scale, solution.zero, self.options.group_size, w.dtype),
                False,
            )

    def _round(self, rows: Tensor) -> Solution:
        o = self.options
        wide = rows.to(self.hessian_dtype)
        scale, zero = weight_scales(wide, o.bits, o.symmetric, o.group_size, o.mse_clip)
        return Solution(quantize_weight(wide, scale, zero, o.bits, o.symmetric, o.group_size), scale, zero)


def _linear(layer: nn.Module, role: str) -> nn.Linear:
    module = layer.get_submodule(role)
    return cast(nn.Linear, getattr(module, "linear", module))


def _gather(part: Tensor, rows: int, world: World) -> Tensor:
    """The rows of all ranks, in order, on every rank."""
    if world.size == 1:
        return part
    spans = split_rows(rows, world.size)
    longest = max(stop - start for start, stop in spans)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    every = part.new_empty(world.size * longest, *part.shape[1:])
    dist.all_gather_into_tensor(every, padded)
    return torch.cat([every[r * longest : r * longest + stop - start] for r, (start, stop) in enumerate(spans)])
