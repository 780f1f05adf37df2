"""A whole quantised model as transformers knows it: for `generate()`, pipelines, harnesses and exports' oracle.

    model = build_full_model(config, sites, layer=weights_of_layer, embedding=e, head=h, rotated=True, device=device, dtype=dtype)

The class, the modules and the cache are transformers' own; the sites quantise and rotate inside of them. Values are quantised
before they enter the cache. Keys enter it as they are after the position embedding and are rotated by R3 and quantised each
time attention reads them, always from the unquantised key: so any kind of cache is right and no key is quantised twice. A
bias that is kept apart (`sites.KeyBiasApart`) lies in the cache behind them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import norm_eps
from dist_spin.model.layers import LayerRunner
from dist_spin.model.sites import WideRMSNorm
from dist_spin.model.sites_config import Sites


def build_full_model(
    config: Any,
    sites: Sites,
    *,
    layer: Callable[[int], dict[str, Tensor]],
    embedding: Tensor,
    head: Tensor,
    final_gain: Tensor | None = None,
    rotated: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The family's AutoModelForCausalLM with given weights and sites, in eval mode, without gradients.

    Its forward pass does what `LayerRunner` and `Head` do, layer for layer and bit for bit.

    Args:
        config: the original transformers config; copied. The model's own says that embedding and lm_head are not tied.
        layer: parameters of decoder layer i by their names within it, any dtype; asked for one after another.
        embedding, head: [vocab, h], without the factors of `Shape.scaling`, which the family's own modules apply.
        final_gain: [h], gain of the final norm where it is not folded into the head.
        rotated: whether norm gains are folded into the weights (and R1, R2, R4 merged).
    """
    runner = LayerRunner(config, sites, device=device, dtype=dtype, rotated=rotated)
    model = runner.base

    def frozen(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.to(device, dtype), requires_grad=False)

    for index in range(runner.shape.layers):
        model.model.layers[index] = runner.build(index, layer(index))
    model.model.embed_tokens.weight = frozen(embedding)
    if hasattr(model.model.embed_tokens, "embed_scale"):  # a buffer that no checkpoint stores
        model.model.embed_tokens.embed_scale = torch.tensor(runner.shape.scaling.embedding, dtype=dtype, device=device)
    gain = None if final_gain is None else frozen(final_gain)
    model.model.norm = WideRMSNorm(norm_eps(model.config), gain, runner.shape.norm)
    model.model.rotary_emb = runner.rotary
    model.lm_head.weight = frozen(head)
    # The skeleton asks for no cache, and transformers took its generation settings from there.
    model.config.use_cache = model.generation_config.use_cache = True
    return model.eval()
