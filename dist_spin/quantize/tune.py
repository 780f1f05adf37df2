"""After rounding: the scales of the weights' codes, and the gains of norms, learn to predict as full precision does.

    dist-spin quantize CONFIG.yaml quantize.tune_steps=200

Codes stay as GPTQ left them, and so do scales that a format holds in 8 bits: nothing is added to the model. Step sizes alone were
trained so by EfficientQAT (Chen et al. 2024, its second phase), on the text; here towards the predictions of full precision, with
activations quantised. The whole model is on one device, one layer's activations at a time; ranks share the sequences of a step. A
start that is interrupted begins again from the rounded layers.
"""

import dataclasses
import math
import shutil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_spin.data import batch_indices, rank_share
from dist_spin.errors import Interrupted, UserError
from dist_spin.model.loss import distillation
from dist_spin.model.sites import plain_sites
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.formats import has_narrow_scales
from dist_spin.numerics.quantizer import dequantize_weight
from dist_spin.pipeline.fingerprints import gptq_options
from dist_spin.pipeline.model import model_dtype
from dist_spin.quantize.job import QuantizeJob
from dist_spin.runtime.distributed import any_rank, on_rank0, raise_on_any_failure, sum_over_ranks_
from dist_spin.runtime.progress import Progress, say
from dist_spin.storage.quantized_layers import QuantizedLayer, save_layer
from dist_spin.storage.run_directory import LEARNED

BATCH = 4  # sequences of a step, over all ranks
TOKENS_AT_ONCE = 8192  # that go through a layer together
HELD_OUT = 16  # every so manieth calibration sequence is not learned from: it tells whether learning helped
NORM_GAINS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def tunes(job: QuantizeJob) -> bool:
    """Whether a variant's layers are tuned once they are rounded."""
    return job.config.quantize.tune_steps > 0 and job.variant.name == LEARNED


def untuned(job: QuantizeJob) -> QuantizeJob:
    """The same variant under another name, as it is rounded."""
    settings = dataclasses.replace(job.config.quantize, tune_steps=0)
    config = dataclasses.replace(job.config, quantize=settings)
    return dataclasses.replace(job, config=config, variant=dataclasses.replace(job.variant, name="untuned"))


def remove_untuned(job: QuantizeJob) -> None:
    """Delete the layers as they were rounded, if there are any: the tuned ones have taken their place."""
    shutil.rmtree(untuned(job).path(0).parent.parent, ignore_errors=True)


def tune(job: QuantizeJob, rounded: QuantizeJob) -> None:
    """Tune the layers of `rounded` and keep them as those of `job`; called by all ranks together.

    Raises:
        Interrupted: a signal came; the rounded layers are kept.
        UserError: a rounded layer is not there.
    """
    settings, world, tokens = job.config.quantize, job.world, job.tokens
    held_out = list(range(0, len(tokens), HELD_OUT)) if len(tokens) > 1 else []
    learned = [index for index in range(len(tokens)) if index not in held_out] or [0]
    network = TunedNetwork(job, rounded)
    made: list[Tensor] = []
    raise_on_any_failure(lambda: made.append(full_precision_states(job)))
    targets = made[0]
    optimizer = torch.optim.Adam(list(network.parameters.values()), settings.tune_lr)
    at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    progress = Progress("tune: step", settings.tune_steps, show=world.is_rank0)

    def mean_loss(indices: list[int], *, learn: bool) -> float:
        total = torch.zeros((), dtype=torch.float64, device=world.device)

        def compute() -> None:
            own = rank_share(indices, world.rank, world.size)
            for first in range(0, len(own), at_once):
                part = own[first : first + at_once]
                with torch.set_grad_enabled(learn):
                    loss = network.loss(tokens[part], targets[part]) * (len(part) / len(indices))
                if learn:
                    loss.backward()
                total.add_(loss.detach())

        raise_on_any_failure(compute)
        return float(sum_over_ranks_(total))

    before = mean_loss(held_out, learn=False)
    for step in range(settings.tune_steps):
        chosen = batch_indices(step, BATCH, len(learned), settings.seed)
        loss = mean_loss([learned[index] for index in chosen], learn=True)
        network.reduce_gradients()
        optimizer.param_groups[0]["lr"] = settings.tune_lr * (1 + math.cos(math.pi * step / settings.tune_steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(f"divergence {loss:.4f}")
        if any_rank(bool(job.stop)):
            raise Interrupted(
                f"stopped by a signal after step {step + 1} of tuning", "the same command begins it again"
            )
    after = mean_loss(held_out, learn=False)
    kept = (math.isfinite(after) and after < before) or not held_out
    if world.is_rank0:
        say(f"divergence of held-out sequences {before:.4f}, after tuning {after:.4f}" + ("" if kept else ": undone"))

    def write() -> None:
        for index, layer in enumerate(network.layers):
            save_layer(job.path(index), network.tuned(index) if kept else layer, job.fingerprint)
        job.run.event("tuned", variant=job.variant.name, before=before, after=after, kept=kept)
        remove_untuned(job)

    on_rank0(write)


@torch.no_grad()
def full_precision_states(job: QuantizeJob) -> Tensor:
    """What the head of the 16-bit model reads, of every calibration sequence: [n, T, h] on the CPU, in the model's dtype.

    In the basis of the variant, whose head then serves both models.
    """
    weights = job.variant.weights
    hidden = list(weights.embedded(job.tokens).split(BATCH))
    with plain_sites():
        for index in range(job.files.shape.layers):
            layer = job.runner.build(index, weights.layer(index))
            hidden = [job.runner.run(layer, index, part) for part in hidden]
    norm = weights.head(job.files.config.rms_norm_eps).norm
    return torch.cat([norm(part).cpu() for part in hidden])


class TunedNetwork:
    """The quantised network as a function of multipliers of its scales and gains.

    parameters: logarithms of the multipliers, by (layer, tensor): [out, groups] of a linear, [h] of a norm; fp32 or wider.
    Linears have none where their format holds scales in 8 bits: there gains alone learn.
    """

    def __init__(self, job: QuantizeJob, rounded: QuantizeJob) -> None:
        """Raises UserError if a rounded layer is not there, or there is nothing to tune."""
        self.job, self.device, self.dtype = job, job.world.device, model_dtype(job.config)
        self.runner = job.variant.runner(job.files.config, job.variant.sites, self.device, self.dtype)
        self.embedding, self.head = job.variant.weights.embedding(), job.variant.weights.head_weight()
        self.norm = job.variant.weights.head(job.files.config.rms_norm_eps).norm
        self.layers: list[QuantizedLayer] = []
        self.modules: list[nn.Module] = []
        self.parameters: dict[tuple[int, str], nn.Parameter] = {}
        scales_learn = not has_narrow_scales(job.config.quant.w_format)

        def load() -> None:
            for index in range(job.files.shape.layers):
                layer = rounded.load(index, self.device)
                if layer is None:
                    raise UserError(f"layer {index} is not rounded", "start `dist-spin quantize` again")
                self.layers.append(layer)
                self.modules.append(self.runner.build(index, layer.weights(self.dtype, self.device)))
                wide = accumulation_dtype(self.dtype)
                sizes = {f"{role}.weight": q.scale.shape for role, q in layer.quantized_weights.items() if scales_learn}
                sizes |= {name: layer.others[name].shape for name in NORM_GAINS if name in layer.others}
                for name, size in sizes.items():
                    self.parameters[index, name] = nn.Parameter(torch.zeros(size, dtype=wide, device=self.device))

        raise_on_any_failure(load)
        if not self.parameters:  # `rotation.load` holds no scales
            raise UserError("quantize.tune_steps finds neither scales nor gains", "set it to 0", shared=True)

    def reduce_gradients(self) -> None:
        """Sum the gradients over ranks."""
        flat = torch.cat([_gradient(p).flatten() for p in self.parameters.values()])
        sum_over_ranks_(flat)
        for p, part in zip(
            self.parameters.values(), flat.split([p.numel() for p in self.parameters.values()]), strict=True
        ):
            p.grad = part.view_as(p)

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Mean divergence from `target` [batch, T, h] (`full_precision_states`) on ids [batch, T], a scalar."""
        hidden = self.embedding[ids.to(self.device)]
        for index in range(len(self.modules)):
            context = self.runner.context(index, hidden)
            hidden = checkpoint(self._layer, index, hidden, context, use_reentrant=False, preserve_rng_state=False)
        return distillation(self.norm(hidden), target.to(self.device), self.head, ids.to(self.device)).mean()

    def _layer(self, index: int, hidden: Tensor, context: dict[str, Any]) -> Tensor:
        module, layer = self.modules[index], self.layers[index]
        tensors = {}
        for name, _ in module.named_parameters():
            plain = name.replace(".linear.", ".").replace(".norm.", ".")  # its name in a plain layer
            if (index, plain) in self.parameters:
                factor = self.parameters[index, plain].exp()
                if plain in NORM_GAINS:
                    tensors[name] = (layer.others[plain].to(factor) * factor).to(self.dtype)
                else:
                    codes, scale, zero = layer.quantized_weights[plain.removesuffix(".weight")]
                    tensors[name] = dequantize_weight(codes, scale * factor, zero, layer.group_size, self.dtype)
        output: Tensor = torch.func.functional_call(module, tensors, (hidden,), {"use_cache": False, **context})
        return output

    @torch.no_grad()
    def tuned(self, index: int) -> QuantizedLayer:
        """Layer `index` with its multipliers in its scales and gains."""
        layer, stored = self.layers[index], gptq_options(self.job.config).scale_dtype
        quantized, others = {}, dict(layer.others)
        for role, weight in layer.quantized_weights.items():
            scale = weight.scale
            if (index, f"{role}.weight") in self.parameters:
                scale = scale * self.parameters[index, f"{role}.weight"].exp().to(scale)
                scale = scale if stored is None else scale.to(stored).to(scale.dtype)
            quantized[role] = weight._replace(scale=scale)
        for name in NORM_GAINS:
            if (index, name) in self.parameters:
                gain = self.parameters[index, name].exp()
                others[name] = (others[name].to(gain) * gain).to(others[name].dtype)
        return dataclasses.replace(layer, quantized_weights=quantized, others=others)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
