"""Quantise one decoder layer from the hidden states that enter it; under several ranks each holds some sequences.

Input statistics are shared per site (q, k, v see one input; gate and up one), and every later site sees the earlier ones
already quantised (Frantar et al. 2022). Each part of the layer runs once per batch of sequences.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM
from dist_spin.model.experts import SHARED
from dist_spin.model.layers import LayerRunner
from dist_spin.model.output_norms import ATTENTION_OUTPUT_NORM, MLP_OUTPUT_NORM
from dist_spin.model.sites_config import INPUT_SCALES
from dist_spin.model.stacked_experts import by_expert
from dist_spin.numerics.format_rounding import SATURATES_BEYOND, global_scale, grouped
from dist_spin.numerics.formats import FORMATS
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.hessian import TOKEN_CHUNK
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize
from dist_spin.quantize.site_solver import SiteSolver, equal_parts, experts_at_once
from dist_spin.runtime.distributed import World, max_over_ranks, sum_over_ranks_
from dist_spin.runtime.progress import warn
from dist_spin.storage.quantized_layers import QuantizedLayer

PARTS = ("forward", "hessian", "factor", "solve", "errors")  # what a clock is asked to time


class LayerQuantizer:
    """Quantises layers with one set of options, but for the bits of down_proj if `down_bits` gives it its own.

    hessian_dtype: fp32, or fp64 where results must not depend on how sequences are split over ranks. clock: entered
    around each of `PARTS`, for benchmarks. exact_columns: of a layer's index, the input columns [n] int64 of its
    linears that stay exact, by linear; those of one site are the same.
    cd_passes: passes over the columns after GPTQ that make its codes better (`coordinate_descent`). input_scales: find
    NVFP4's global scales of what linears read, from the largest value of all sequences. expert_tokens: which tokens make an
    expert's Hessian, as `quantize.expert_tokens`.
    """

    def __init__(
        self,
        runner: LayerRunner,
        world: World,
        method: str,
        options: GPTQOptions,
        hessian_dtype: torch.dtype,
        clock: Callable[[str], AbstractContextManager[object]] = lambda part: nullcontext(),
        down_bits: int = 0,
        exact_columns: Callable[[int], dict[str, Tensor]] = lambda index: {},
        cd_passes: int = 0,
        *,
        input_scales: bool = False,
        expert_tokens: str = "auto",
    ) -> None:
        self.expert_tokens = expert_tokens
        self.runner, self.world, self.method, self.options = runner, world, method, options
        self.hessian_dtype, self.clock = hessian_dtype, clock
        self.exact_columns, self.cd_passes, self.input_scales = exact_columns, cd_passes, input_scales
        self.down_options = dataclasses.replace(options, bits=down_bits or options.bits)

    @torch.no_grad()
    def quantize(self, index: int, weights: dict[str, Tensor], hidden: list[Tensor]) -> QuantizedLayer:
        """Quantise layer `index` and move `hidden` (this rank's sequences, in batches [b, T, h]) through it, in place.

        weights: the layer's parameters by their names within it, rotations merged.

        Raises:
            NumericsError: the hidden states, or what a linear reads, are not finite.
        """
        self._index, self._layer, shape = index, self.runner.build(index, weights), self.runner.shape.layer(index)
        self._result = QuantizedLayer(
            {},
            {k: w for k, w in weights.items() if not (k.endswith(".weight") and k[: -len(".weight")] in shape.linears)},
            {},
            {},
            self.options.symmetric,
            self.options.group_size,
            self.options.format,
        )
        self._solver = SiteSolver(
            self._layer,
            index,
            self._result,
            self.world,
            self.method,
            self.hessian_dtype,
            self.clock,
            self.exact_columns(index),
            self.cd_passes,
        )
        attention: Any = self._layer.self_attn
        mlp: Any = self._layer.mlp
        attention_norm, mlp_norm = getattr(self._layer, ATTENTION_NORM), getattr(self._layer, MLP_NORM)

        found: list[float] = []  # global scales of inputs, in the order of SCALED_SITES
        linears = ("q_proj", "k_proj", "v_proj")
        self._scale_norm(attention_norm, hidden, found)
        self._solve([f"self_attn.{n}" for n in linears], (attention_norm(h) for h in hidden), self.options)
        output, attention.o_proj = attention.o_proj, attention.o_proj.input_quant
        with self.clock("forward"):  # what o_proj reads
            inputs = self._read(attention.o_proj, lambda h: self._attend(index, attention_norm(h)), hidden, found)
        attention.o_proj = output
        self._solve(["self_attn.o_proj"], inputs, self.options)
        aside: list[Tensor] = []  # outputs of attention, where the MLP reads what attention has read
        self._add_to_residual(hidden, inputs, output.linear, ATTENTION_OUTPUT_NORM, aside)

        self._scale_norm(mlp_norm, hidden, found)
        if shape.experts:
            self._quantize_experts(mlp, mlp_norm, hidden)
            return self._result
        self._solve(["mlp.gate_proj", "mlp.up_proj"], (mlp_norm(h) for h in hidden), self.options)
        down, mlp.down_proj = mlp.down_proj, mlp.down_proj.input_quant
        with self.clock("forward"):  # what down_proj reads
            inputs = self._read(mlp.down_proj, lambda h: mlp(mlp_norm(h)), hidden, found)
        mlp.down_proj = down
        self._solve(["mlp.down_proj"], inputs, self.down_options)
        self._add_to_residual(hidden, inputs, down.linear, MLP_OUTPUT_NORM, aside)
        if found:
            self._result.others[INPUT_SCALES] = torch.tensor(found)
        return self._result

    def _scale_norm(self, norm: Any, hidden: list[Tensor], found: list[float]) -> None:
        """Set the global scale of what the site behind a norm quantises, and add it to `found`."""
        if self.input_scales:
            with self.clock("forward"):
                spec, norm.spec = norm.spec, QuantSpec()
                norm.spec = self._scaled(spec, (norm(h) for h in hidden), found)

    def _read(
        self, site: Any, run: Callable[[Tensor], Tensor], hidden: list[Tensor], found: list[float]
    ) -> list[Tensor]:
        """What the linear behind `site` reads, by `run` up to the site; its global scale is set and added to `found`."""
        if not self.input_scales:
            return [run(h) for h in hidden]
        spec, site.spec = site.spec, QuantSpec()
        inputs = [run(h) for h in hidden]
        site.spec = self._scaled(spec, inputs, found)
        for i, x in enumerate(inputs):
            inputs[i] = fake_quantize(x, site.spec)
        return inputs

    def _scaled(self, spec: QuantSpec, unrounded: Iterable[Tensor], found: list[float]) -> QuantSpec:
        """A site's quantiser with NVFP4's global scale of what it will round, on all ranks; the scale is added to `found`.

        It is that of the largest value, unless the scales of usual groups would then be below E4M3's normal numbers, where they
        lose their bits and become 0: a few values beyond that (those of a sink token) saturate. Usual is the geometric mean.
        """
        largest = torch.zeros((), dtype=torch.float32, device=self.runner.device)
        logs = torch.zeros(
            2, dtype=torch.float64, device=self.runner.device
        )  # sum, and number, of groups that are not 0
        for x in unrounded:
            groups = grouped(x, FORMATS["nvfp4"].group).abs().amax(-1).float()
            largest, filled = torch.maximum(largest, groups.amax()), groups > 0
            logs += torch.stack((torch.where(filled, groups, 1.0).log2().sum(dtype=torch.float64), filled.sum()))
        # The bits of numbers that are not negative are in their order, NaN last.
        shared = torch.tensor(max_over_ranks(int(largest.view(torch.int32))), dtype=torch.int32).view(torch.float32)
        total, count = sum_over_ranks_(logs.cpu()).tolist()
        if count and shared > (limit := SATURATES_BEYOND * 2.0 ** (total / count)):
            shared = torch.tensor(limit, dtype=torch.float32)
        found.append(float(global_scale(shared)))
        return dataclasses.replace(spec, tensor_scale=found[-1]) if spec.enabled else spec

    def _quantize_experts(self, mlp: Any, norm: nn.Module, hidden: list[Tensor]) -> None:
        """Each expert from the tokens routed to it, or from all (`expert_tokens`); then the layer's output.

        Figures of its linears tell how many tokens were routed to it, "tokens", and how many its Hessian is of, "calibrated".
        """
        with self.clock("forward"):
            read = torch.cat([norm(h).flatten(0, -2) for h in hidden]) if hidden else mlp.gate.weight[:0]  # [tokens, h]
            chosen = mlp.gate(read)[1]  # [tokens, experts per token]
            order, stops = by_expert(chosen, len(mlp.experts))
            readers = order // mlp.gate.chosen
        starts = [0, *stops[:-1]]
        counts = torch.tensor([stop - start for start, stop in zip(starts, stops, strict=True)], dtype=torch.float64)
        tokens = [int(count) for count in sum_over_ranks_(counts.to(self.runner.device)).tolist()]
        every = sum(tokens) // mlp.gate.chosen
        needed = max(self.runner.shape.hidden, self.runner.shape.intermediate)
        few = sum(count < needed for count in tokens)
        enough = {"auto": needed, "routed": 1, "all": every + 1}[self.expert_tokens]
        sees_all = [count < enough for count in tokens]
        if self.method == "gptq" and few and self.expert_tokens != "all" and self.world.is_rank0:
            what = "are those of all tokens" if self.expert_tokens == "auto" else "are of low rank"
            warn(
                f"layer {self._index}: {few} of {len(tokens)} experts were chosen by fewer than {needed} calibration tokens "
                f"(the fewest: {min(tokens)}), so that their Hessians {what}; give more of them (quantize.n_sequences)"
            )

        def read_by(index: int) -> Iterator[Tensor]:
            """What an expert's Hessian is of; of index -1, the shared expert's, all."""
            own = None if index < 0 or sees_all[index] else readers[starts[index] : stops[index]]
            for lo in range(0, len(read) if own is None else len(own), TOKEN_CHUNK):
                part = slice(lo, lo + TOKEN_CHUNK)
                yield mlp.input_site(read[part] if own is None else read[own[part]])

        def read_by_down(expert: Any, index: int) -> Iterator[Tensor]:
            """What its down_proj reads, once gate_proj and up_proj are rounded."""
            return (expert.down_proj.input_quant(expert.inner(x)) for x in read_by(index))

        def solve_experts(experts: dict[int, Any]) -> None:
            """Experts by index, all of one width."""
            names = [SHARED if index < 0 else f"mlp.experts.{index}" for index in experts]
            first = [[f"{name}.gate_proj", f"{name}.up_proj"] for name in names]
            self._solver.solve(first, map(read_by, experts), self.options)
            read_by_all = (read_by_down(expert, index) for index, expert in experts.items())
            self._solver.solve([[f"{name}.down_proj"] for name in names], read_by_all, self.down_options)

        shape, numbered = self.runner.shape, list(enumerate(mlp.experts))
        at_once = experts_at_once(shape.hidden, shape.intermediate, self.hessian_dtype, self.runner.device)
        for lo, hi in equal_parts(len(numbered), at_once):
            solve_experts(dict(numbered[lo:hi]))
        for index in range(len(numbered)):
            seen = {"tokens": tokens[index], "calibrated": every if sees_all[index] else tokens[index]}
            for linear in ("gate_proj", "up_proj", "down_proj"):
                self._result.figures[f"mlp.experts.{index}.{linear}"] |= seen
        if mlp.has_shared:
            solve_experts({-1: mlp.shared_expert})
        with self.clock("forward"):
            written = [mlp(part[None])[0] for part in read.split(TOKEN_CHUNK)] if hidden else []
            lengths = [h[..., 0].numel() for h in hidden]  # several sequences to a tensor on GPUs
            for i, part in enumerate(torch.cat(written).split(lengths) if hidden else ()):
                hidden[i] = hidden[i] + part.view_as(hidden[i])

    def _add_to_residual(
        self, hidden: list[Tensor], inputs: list[Tensor], linear: nn.Module, norm: str, aside: list[Tensor]
    ) -> None:
        """Add the outputs of `linear`, through the norm of that name if there is one, to the residual stream, in place.

        Each input is freed once it is used. Where attention and MLP read the same, the outputs of attention wait in `aside`.
        """
        through: Any = getattr(self._layer, norm, nn.Identity())
        parallel = getattr(self._layer, "parallel", False)
        with self.clock("forward"):
            for i in reversed(range(len(hidden))):
                output = through(linear(inputs.pop()))
                if parallel and norm == ATTENTION_OUTPUT_NORM:
                    aside.insert(0, output)
                    continue
                hidden[i] = (hidden[i] + aside.pop() if aside else hidden[i]) + output

    def _attend(self, index: int, normed: Tensor) -> Tensor:
        attention: Any = self._layer.self_attn
        return attention(hidden_states=normed, **self.runner.context(index, normed))[0]

    def _solve(self, roles: list[str], inputs: Iterable[Tensor], options: GPTQOptions) -> None:
        """Quantise the linears of one site."""
        self._solver.solve([roles], [inputs], options)
