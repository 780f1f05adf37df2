"""GPTQ against GPTAQ (Li et al. 2025), which also makes up for what the layers before have changed in a linear's input.

    python benchmarks/asymmetric_gptq.py OUT --learn tokens:L.npy#all --texts tokens:A.npy#all tokens:B.npy#all --seeds 0 1 2

GPTQ rounds W so that Q x stays close to W x for the inputs x of the quantised network, GPTAQ so that it stays close to W x',
x' being what the full-precision network has there. With D = (2/n) sum (x' - x) xT beside H = (2/n) sum x xT, column j hands
what it owes, w_j D_j, to the columns after it through the inverse of their part of H: w_k += w_j P_jk with
P = (D UT o strictly upper) U, UT U = H^-1.
All together that is GPTQ of W M with the feedback 1 + (F - 1) M, where M = (1 - P)^-1, which the product's own solver computes.
Coordinate descent after it goes for the optimum W (1 + D H^-1). A random Hadamard is rounded, nothing is learned, and --learn is
what is calibrated on. Prints perplexity and KL from full precision as rows come in.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accuracy import study_parser
from torch import Tensor

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.evaluate.stage import evaluate
from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM
from dist_spin.numerics.batched_factor import prepare_all
from dist_spin.numerics.coordinate_descent import refine_all
from dist_spin.numerics.gptq import Factor, GPTQOptions, QuantizedWeight, added_diagonal, exact_products, solve_all
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.optimize.train import train
from dist_spin.quantize import site_solver
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.quantize.stage import prepare_jobs, quantize_variants
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import World, start, stop
from dist_spin.storage.quantized_layers import QuantizedLayer
from dist_spin.storage.run_directory import run_dir

REFINED = ["quantize.cd_passes=4", "quantize.clip_norm=2"]
ROUNDED = ["quantize.quantize_activations=true"]
ROWS: dict[str, tuple[list[str], float]] = {  # settings, and the share of D that is taken: 0 is GPTQ
    "GPTQ, refined": (REFINED, 0.0),
    "GPTAQ, refined": (REFINED, 1.0),
    "GPTAQ, a quarter of D, refined": (REFINED, 0.25),
    "GPTAQ, inputs rounded, refined": ([*REFINED, *ROUNDED], 1.0),
    "GPTAQ, inputs rounded, a quarter of D, refined": ([*REFINED, *ROUNDED], 0.25),
    "GPTQ, inputs rounded, refined": ([*REFINED, *ROUNDED], 0.0),
    "GPTQ": ([], 0.0),
    "GPTAQ": ([], 1.0),
}
FIRST = ("q_proj", "o_proj", "gate_proj", "down_proj")  # linear of each site


class AsymmetricQuantizer(LayerQuantizer):
    """A quantiser that runs the full-precision network beside the quantised one; of one process."""

    share: float
    clean: list[Tensor]  # what enters the layer in the full-precision network, [1, T, h] each

    @torch.no_grad()
    def quantize(self, index: int, weights: dict[str, Tensor], hidden: list[Tensor]) -> QuantizedLayer:
        """As the base class; layers must come in order, from the first."""
        if index == 0:
            self.clean = [h.clone() for h in hidden]
        layer: Any = self.runner.build(index, weights)
        attention, mlp = layer.self_attn, layer.mlp
        read = (getattr(layer, ATTENTION_NORM), attention.o_proj.input_quant)
        read = (*read, getattr(layer, MLP_NORM), mlp.down_proj.input_quant)
        for site in (*read, attention.v_proj, attention.key_site):
            site.spec = QuantSpec()
        self.clean_inputs: dict[str, list[Tensor]] = {name: [] for name in FIRST}
        for name, site in zip(FIRST, read, strict=True):
            site.register_forward_hook(lambda _, __, output, name=name: self.clean_inputs[name].append(output))
        for i, h in enumerate(self.clean):
            self.clean[i] = self.runner.run(layer, index, h)
        return super().quantize(index, weights, hidden)

    def _solve(self, roles: list[str], inputs: Iterable[Tensor], options: GPTQOptions) -> None:
        wanted = self.clean_inputs.pop(roles[0].rpartition(".")[2])
        self.owed: Tensor | None = None  # D, [in, in]
        site_solver.prepare_all, site_solver.solve_all = self.prepare_asymmetric, self.solve_asymmetric
        site_solver.refine_all = self.refine_asymmetric
        try:
            super()._solve(roles, self._watched(inputs, wanted), options)
        finally:
            site_solver.prepare_all, site_solver.solve_all = prepare_all, solve_all
            site_solver.refine_all = refine_all

    def _watched(self, inputs: Iterable[Tensor], wanted: list[Tensor]) -> Iterator[Tensor]:
        """The inputs, summed up into D on their way."""
        tokens = sum(x[..., 0].numel() for x in wanted)
        for x, original in zip(inputs, wanted, strict=True):
            wide, clean = (each.flatten(0, -2).to(self.hessian_dtype) for each in (x, original))
            with exact_products():
                part = (clean - wide).T @ wide * (2 * self.share / tokens)
            self.owed = part if self.owed is None else self.owed + part
            yield x

    def prepare_asymmetric(self, hessians: Tensor, options: GPTQOptions) -> list[Factor]:
        """The factor of GPTAQ's updates, and what the weights are multiplied by before them and before coordinate descent.

        hessians: of the one site, [1, in, in].
        """
        assert self.owed is not None
        (hessian,), (factor,) = hessians, prepare_all(hessians, options)
        f, ones = factor.feedback, torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        with exact_products():
            damped = hessian + torch.diag(added_diagonal(hessian, factor.dead, factor.damping))
            scaled = self.owed @ f.T / ((f @ damped) * f).sum(-1)  # f damped fT = 1 / diag(U)^2
            unsolved = ones - scaled.triu(1) @ f  # 1 - P
            self.moved = torch.linalg.solve_triangular(unsolved, ones, upper=True, unitriangular=True)  # M
            self.optimum = ones + scaled @ f  # 1 + D H^-1
            return [factor._replace(feedback=ones + (f - ones) @ self.moved)]

    def solve_asymmetric(self, w: Tensor, factors: list[Factor], options: list[GPTQOptions]) -> QuantizedWeight:
        """`solve_all` by GPTAQ's updates."""
        with exact_products():
            return solve_all(w.to(self.moved.dtype) @ self.moved, factors, options)

    def refine_asymmetric(self, w: Tensor, quantized: QuantizedWeight, *more: Any) -> QuantizedWeight:
        """`refine_all` towards what the full-precision network has."""
        with exact_products():
            return refine_all(w.to(self.optimum.dtype) @ self.optimum, quantized, *more)


def main() -> None:
    """Run the study."""
    parser = study_parser(seeds=[0, 1, 2])
    parser.add_argument(
        "--rows", metavar="ROW", nargs="+", default=list(ROWS), choices=list(ROWS), help="; ".join(ROWS)
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="start no row after so long")
    options = parser.parse_intermixed_args()
    world = start()
    quieten_libraries()
    began = time.monotonic()
    print("row | seed | " + " | ".join(f"{text}: perplexity, KL, top-1" for text in options.texts) + " | seconds")
    for name in options.rows:
        for seed in options.seeds:
            if time.monotonic() - began < 60 * options.minutes:
                one(options, world, name, seed)
    stop()


def one(options: Any, world: World, name: str, seed: int) -> None:
    """Quantise, measure, print."""
    began = time.monotonic()
    settings, share = ROWS[name]
    words = [f"output_dir={options.out}", f"name={name.replace(', ', '-').replace(' ', '-')}-{seed}"]
    words += [f"model.path={options.model}", f"rotation.seed={seed}", f"quantize.seed={seed}", "optimize.steps=0"]
    words += [f"quantize.source={options.learn}", "quantize.split=all", "evaluate.split=all"]
    words += [f"evaluate.sources=[{','.join(options.texts)}]", *settings, *options.settings]
    config = load_config(None, words)
    train(config, world)
    jobs = prepare_jobs(config, world)
    for job in jobs:
        job.quantizer.__class__ = AsymmetricQuantizer
        job.quantizer.share = share  # type: ignore[attr-defined]
    quantize_variants(jobs)
    rows = [row for row in evaluate(config, world) if row["weights"] != "none"]
    cells = [f"{row['ppl']:.3f} {row['kl']:.4f} {100 * row['top1']:.2f}" for row in rows]
    print(f"{name} | {seed} | {' | '.join(cells)} | {time.monotonic() - began:.0f}", flush=True)
    (run_dir(config).path / "study.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
