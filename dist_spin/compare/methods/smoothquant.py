"""SmoothQuant (Xiao et al. 2023): move the outliers of activations into weights, per channel, through the norm's gain.

x is divided and W multiplied by s = max|X|^a / max|W|^(1-a) per input channel of q, k, v together and of gate, up (equation 4).
The strength a is searched for each layer, by the error of the layer's output under the bits asked for.
"""

import torch
from torch import Tensor

from dist_spin.compare.methods.transformed_layer import State, TransformedRunner, merged
from dist_spin.model.layer_inputs import READERS, LayerTask, maxima, weight_maxima
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import dequantize_weight, quantize_weight, weight_scales

LEAST = 1e-5  # of a maximum, so that a channel that is never used gets a finite scale
SEARCH_SEQUENCES = 8  # of the calibration text, on which strengths are compared


def smoothing(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s [n] from the largest |x| and |w| of each channel."""
    return x_max.clamp(min=LEAST) ** alpha / w_max.clamp(min=LEAST) ** (1 - alpha)


def learn_layer(
    task: LayerTask, sites: Sites, options: dict[str, GPTQOptions], alphas: list[float]
) -> tuple[State, dict[str, float]]:
    """The layer's state (see `methods.transformed`) and figures: the strength found and its relative error.

    options: how each linear's weight is rounded; empty for 16-bit weights.
    """
    largest, outputs = maxima(task)
    w_max = {site: weight_maxima(task.weights, READERS[site]).to(outputs.dtype) for site in ("attention", "mlp")}
    some = task.hidden[:SEARCH_SEQUENCES]
    change = float((outputs[: len(some)] - some).square().mean())
    best, best_error, best_alpha = State(), float("inf"), 0.0
    for alpha in alphas:
        state = {f"{site}.scale": 1 / smoothing(largest[site], w, alpha) for site, w in w_max.items()}
        made = quantized_layer(task, state, sites, options, some)
        error = float((made - outputs[: len(some)]).square().mean()) / change
        if error < best_error:
            best, best_error, best_alpha = state, error, alpha
    return best, {"alpha": best_alpha, "error": best_error}


def quantized_layer(
    task: LayerTask, state: State, sites: Sites, options: dict[str, GPTQOptions], hidden: Tensor
) -> Tensor:
    """What the layer makes of `hidden` [n, T, h] with a state, activations quantised and weights rounded to nearest."""
    base = task.runner
    runner = TransformedRunner(base.config, sites, lambda index: state, device=base.device, dtype=base.dtype)
    wide = {name: w.to(base.dtype) for name, w in task.weights.items()}
    weights = merged(wide, state, base.shape)
    for role, o in options.items():
        w = weights[f"{role}.weight"]
        scale, zero = weight_scales(w, o.bits, o.symmetric, o.group_size)  # a searched clip would take most of the time
        codes = quantize_weight(w, scale, zero, o.bits, o.symmetric, o.group_size)
        weights[f"{role}.weight"] = dequantize_weight(codes, scale, zero, o.group_size, base.dtype)
    layer = runner.build(task.index, weights)
    return torch.cat([runner.run(layer, task.index, part) for part in hidden.split(1)])
