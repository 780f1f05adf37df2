"""Presets: settings that stand for values of others, resolved before anything reads those."""

from dataclasses import replace

from dist_spin.config.quant import CLIP_PRESETS, QuantConfig
from dist_spin.config.run import RunConfig


def resolve_clips(quant: QuantConfig) -> QuantConfig:
    """The same with the clip ratios that `quant.clips` stands for."""
    return replace(quant, **CLIP_PRESETS.get(quant.clips, {}))


def resolve_presets(config: RunConfig) -> RunConfig:
    """The same with every preset resolved; resolved settings come back as they are.

    `quant.arithmetic=auto` becomes what `export.target` needs, once and for all: a run keeps it when its target changes.
    """
    quant = resolve_clips(config.quant)
    if quant.arithmetic == "auto":
        target = config.export.target
        quant = replace(quant, arithmetic=target if target == "compressed-tensors" else "fp32")
    return replace(config, quant=quant)
