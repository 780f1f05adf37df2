"""SmoothQuant (Xiao et al. 2023): move the outliers of activations into weights, per channel, through the norm's gain.

x is divided and W multiplied by s = max|X|^a / max|W|^(1-a) per input channel of q, k, v together and of gate, up (equation 4).
The strength a is searched for each layer, by the error of the layer's output under the configured bits.
"""

import torch
from torch import Tensor

from dist_spin.compare.methods.base import Figures, Method
from dist_spin.compare.methods.transformed_layer import State, TransformedRunner, merged
from dist_spin.model.layer_inputs import READERS, LayerTask, maxima, weight_maxima
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import dequantize_weight, quantize_weight, weight_scales

MIN_CHANNEL_MAX = 1e-5  # least maximum of a channel, so that one that is never used gets a finite scale
SEARCH_SEQUENCES = 8  # of the calibration text, on which strengths are compared


class SmoothQuant(Method):
    """A state has attention.scale [h] and mlp.scale [h]."""

    label = "SmoothQuant"
    settings_prefix = "smooth_"

    def learn_layer(self, task: LayerTask) -> tuple[State, Figures]:
        """Figures: the best strength, and its error relative to what the layer adds to the residual stream."""
        largest, outputs = maxima(task)
        w_max = {site: weight_maxima(task.weights, READERS[site]).to(outputs.dtype) for site in ("attention", "mlp")}
        hidden, target = task.hidden[:SEARCH_SEQUENCES], outputs[:SEARCH_SEQUENCES]
        power = float((target - hidden).square().mean())
        best, best_error, best_alpha = State(), float("inf"), 0.0
        for alpha in self.config.methods.smooth_alphas:
            state = {f"{site}.scale": 1 / smoothing(largest[site], w, alpha) for site, w in w_max.items()}
            output = quantized_layer(task, state, self.sites, self.weight_options, hidden)
            error = float((output - target).square().mean()) / power
            if error < best_error:
                best, best_error, best_alpha = state, error, alpha
        return best, {"alpha": best_alpha, "error": best_error}


def smoothing(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s [n] from the largest |x| and |w| of each channel (equation 4)."""
    return x_max.clamp(min=MIN_CHANNEL_MAX) ** alpha / w_max.clamp(min=MIN_CHANNEL_MAX) ** (1 - alpha)


def quantized_layer(
    task: LayerTask, state: State, sites: Sites, options: dict[str, GPTQOptions], hidden: Tensor
) -> Tensor:
    """Outputs [n, T, h] of the layer on `hidden` [n, T, h] with a state, activations quantised and weights rounded to nearest.

    options: how each linear's weight is quantised; empty for 16-bit weights.
    """
    base = task.runner
    runner = TransformedRunner(base.config, sites, lambda index: state, device=base.device, dtype=base.dtype)
    wide = {name: w.to(base.dtype) for name, w in task.weights.items()}
    weights = merged(wide, state, base.shape)
    for role, o in options.items():
        w = weights[f"{role}.weight"]
        scale, zero = weight_scales(
            w, o.bits, symmetric=o.symmetric, group_size=o.group_size
        )  # a clip search would take most of the time
        codes = quantize_weight(w, scale, zero, o.bits, symmetric=o.symmetric, group_size=o.group_size)
        weights[f"{role}.weight"] = dequantize_weight(codes, scale, zero, o.group_size, base.dtype)
    layer = runner.build(task.index, weights)
    return torch.cat([runner.run(layer, task.index, sequence) for sequence in hidden.split(1)])
