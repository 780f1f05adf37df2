"""Which inputs of linears pay most for 8 bits (`quant.a8_inputs`): the part that rounding each of them has in the divergence.

    python benchmarks/input_bits.py RUN [--share 0.1] [--sequences 16] [--draws 2] [key.sub=value ...]

RUN is a run whose rotations are made; the sequences are the first of its calibration text. To second order the divergence of
predictions is e F e / 2, for errors e of what is rounded and the Fisher information F: the mean of (g e)^2 / 2, g being the
gradient of the log-probability of tokens drawn from the full-precision predictions. Errors of different tokens are taken for
independent. One backward pass a draw gives all inputs of all layers; the whole model is on one device, without experts.

Prints the parts, and as a setting the inputs that take most of the divergence for each product of their linears, up to
--share of all products.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.cli import report_mistakes
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM, Shape, norm_eps
from dist_spin.model.sites_config import SCALED_SITES, SITE_OF_LINEAR
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.quantizer import fake_quantize
from dist_spin.pipeline.model import model_dtype, open_configured_model
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens, unquantized
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.run_directory import LEARNED
from dist_spin.storage.run_records import read_settings

Input = tuple[int, str]  # layer, and one of SCALED_SITES


class PlainNetwork:
    """A run's model with 16-bit weights and quantisers off, and what its linears read while it runs."""

    def __init__(self, config: RunConfig, files: ModelFiles, variant: Variant, device: torch.device) -> None:
        self.weights, self.sites, layers = variant.weights, variant.sites, range(files.shape.layers)
        self.runner = variant.runner(files.config, unquantized(variant.sites), device, model_dtype(config))
        self.layers = [self.runner.build(index, variant.weights.layer(index)) for index in layers]
        self.embedding, self.head = variant.weights.embedding(), variant.weights.head(norm_eps(files.config))
        self.read: dict[Input, Tensor] = {}
        for index, layer in enumerate(self.layers):
            for site, module in zip(SCALED_SITES, self._modules(layer), strict=True):
                module.register_forward_hook(self._keep((index, site)))

    @staticmethod
    def _modules(layer: nn.Module) -> tuple[nn.Module, ...]:
        norms = (layer.get_submodule(name) for name in (ATTENTION_NORM, MLP_NORM))
        attention, mlp = norms
        o, down = (layer.get_submodule(f"{name}.input_quant") for name in ("self_attn.o_proj", "mlp.down_proj"))
        return attention, o, mlp, down

    def _keep(self, which: Input) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.read[which] = output

        return hook

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """ids [batch, T] to those of every next token, fp32 [batch, T, vocab], with a graph back to what linears read."""
        with torch.enable_grad():
            hidden = self.weights.embedded(ids, self.embedding).detach().requires_grad_()
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden, use_cache=False, **self.runner.context(index, hidden))
            logits = self.head.scaling.logits_of(self.head.norm(hidden) @ self.head.weight.T)
            return logits.float().log_softmax(-1)

    @torch.no_grad()
    def errors(self) -> dict[Input, Tensor]:
        """What rounding changes of each input that was read, [batch, T, n]."""
        specs = [self.sites.layer(index) for index in range(len(self.layers))]
        by_site = [dict(zip(SCALED_SITES, (s.a, s.o, s.mlp or s.a, s.down or s.a), strict=True)) for s in specs]
        return {(i, site): fake_quantize(x, by_site[i][site]) - x for (i, site), x in self.read.items()}


def parts_of_divergence(network: PlainNetwork, tokens: Tensor, draws: int) -> dict[Input, float]:
    """The part of each input in the divergence, nats per token, over tokens [n, T]. draws: of labels, for every token."""
    parts = dict.fromkeys(((i, site) for i in range(len(network.layers)) for site in SCALED_SITES), 0.0)
    for ids in tokens.split(1):
        log_p = network.log_probabilities(ids)
        errors = network.errors()
        for draw in range(draws):
            labels = torch.distributions.Categorical(logits=log_p.detach()).sample()
            total = log_p.gather(-1, labels[..., None]).sum()
            gradients = torch.autograd.grad(total, list(network.read.values()), retain_graph=draw + 1 < draws)
            for which, gradient in zip(network.read, gradients, strict=True):
                by_token = (gradient.float() * errors[which].float()).sum(-1)
                parts[which] += float(by_token.square().sum()) / (2 * draws * tokens.numel())
    return parts


def products(shape: Shape) -> dict[str, int]:
    """Products for each token of the linears that read a layer's inputs, by SCALED_SITES."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q_proj": (q, shape.hidden), "k_proj": (kv, shape.hidden), "v_proj": (kv, shape.hidden)}
    sizes |= {"o_proj": (shape.hidden, q), "down_proj": (shape.hidden, shape.intermediate)}
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), (shape.intermediate, shape.hidden))
    counts = dict.fromkeys(SCALED_SITES, 0)
    for role, site in SITE_OF_LINEAR.items():
        rows, columns = sizes[role.rpartition(".")[2]]
        counts[SCALED_SITES[site]] += rows * columns
    return counts


def chosen_inputs(parts: dict[Input, float], cost: dict[str, int], share: float) -> list[Input]:
    """Those with the largest part for each product, one after another while they fit into `share` of all products."""
    left = share * sum(cost[site] for _, site in parts)
    chosen = []
    for which in sorted(parts, key=lambda which: -parts[which] / cost[which[1]]):
        if cost[which[1]] <= left:
            left -= cost[which[1]]
            chosen.append(which)
    return sorted(chosen)


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--share", type=float, default=0.1, help="of all products, with 8 bits (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="of the calibration text (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="of labels for each token (default: %(default)s)")
    parser.add_argument("settings", metavar="key.sub=value", nargs="*", help="settings in place of the run's")
    options = parser.parse_intermixed_args()
    world = start(alone=True)
    quieten_libraries()
    torch.manual_seed(0)
    config = read_settings(options.run, [*options.settings, "quant.a8_inputs=[]"])
    files = open_configured_model(config)
    if files.shape.experts or config.quant.a_bits == 16:
        raise UserError("this study is for quantised inputs of layers without experts", "give another run")
    variant = build_variant(config, files, LEARNED, world.device)
    tokens = calibration_tokens(config, files)[: options.sequences].to(world.device)
    parts = parts_of_divergence(PlainNetwork(config, files, variant, world.device), tokens, options.draws)
    cost, whole = products(files.shape), sum(parts.values())
    print(
        f"inputs of linears: divergence of {whole:.4f} nats per token to second order; parts in thousandths, by layer"
    )
    for site in SCALED_SITES:
        of_site = [part for (_, name), part in parts.items() if name == site]
        print(f"{site:9} {sum(of_site):.4f}: {' '.join(f'{1000 * part:.1f}' for part in of_site)}")
    chosen = chosen_inputs(parts, cost, options.share)
    taken = sum(cost[site] for _, site in chosen) / sum(cost[site] for _, site in parts)
    print(f"{len(chosen)} inputs, {taken:.1%} of all products, have {sum(parts[w] for w in chosen) / whole:.0%} of it:")
    print(f"quant.a8_inputs=[{','.join(f'{layer}.{site}' for layer, site in chosen)}]")
    stop()


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
