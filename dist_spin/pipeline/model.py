"""What several stages build from a configuration in the same way."""

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.families import FAMILIES
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.formats import has_narrow_scales
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.runtime.distributed import on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import long_step, warn


def model_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of weights and compute."""
    return getattr(torch, dtype_name(config))


def wide_dtype(config: RunConfig) -> torch.dtype:
    """What layers are learned and Hessians summed in: fp32, or fp64 for an fp64 model."""
    return accumulation_dtype(model_dtype(config))


def nothing_to_tune(config: RunConfig) -> bool:
    """Whether `quantize.tune_steps` would find neither scales of codes wider than 8 bits, nor gains, which scales give norms.

    With optimize.steps=0 there are the scales of `rotation.load` alone.
    """
    gains = config.optimize.scales if config.optimize.steps else config.rotation.load is not None
    return has_narrow_scales(config.quant.w_format) and not gains


def open_configured_model(config: RunConfig) -> ModelFiles:
    """Open the model on every rank; what has to be downloaded or converted is so once, by rank 0.

    Raises:
        UserError: it cannot be opened, or settings are not for it.
    """
    check_tuning(config)

    def find() -> ModelFiles:
        return open_model(
            config.model_path,
            revision=config.model.revision,
            dtype=model_dtype(config),
            dummy=config.model.dummy_weights,
            trust_remote_code=config.model.trust_remote_code,
        )

    files: list[ModelFiles] = []

    def find_and_tell() -> None:
        files.append(find())  # not returned: open files do not travel
        for note in files[0].notes:
            warn(note)

    converted = ", which is converted once" if config.model_path.endswith(".gguf") else ""
    with long_step(f"open the model {config.model.path}{converted}"):
        on_rank0(find_and_tell)
        # The others only after it is there; one of them may be on a host that does not see the path.
        raise_on_any_failure(lambda: None if files else files.append(find()))
    check_model_settings(config, files[0].shape, files[0].config.model_type)
    return files[0]


def check_model_settings(config: RunConfig, shape: Shape, model_type: str) -> None:
    """Refuse settings that are not for a model, as `check_expert_settings` and `check_r1` do.

    Raises:
        UserError: names the settings to change.
    """
    check_expert_settings(config, shape)
    check_r1(config, model_type)


def check_stored_teacher(config: RunConfig, shape: Shape) -> None:
    """Refuse to store more predictions of a token than the vocabulary has.

    Raises:
        UserError: names the setting to change.
    """
    if config.optimize.steps and config.optimize.teacher_top_k > shape.vocab:
        problem = (
            f"optimize.teacher_top_k is {config.optimize.teacher_top_k}, and the vocabulary has {shape.vocab} tokens"
        )
        raise UserError(problem, "use fewer, or 0 to store none", shared=True)


def check_tuning(config: RunConfig) -> None:
    """Refuse `quantize.tune_steps` that would find nothing to tune.

    Raises:
        UserError: names the settings to change.
    """
    if config.quantize.tune_steps and nothing_to_tune(config):
        problem = (
            f"quantize.tune_steps finds nothing to tune: quant.w_format={config.quant.w_format} holds scales in 8 bits"
        )
        remedy = "let steps learn scales (optimize.scales=true), which give norms gains, or set quantize.tune_steps=0"
        raise UserError(problem, remedy, shared=True)


def check_r1(config: RunConfig, model_type: str) -> None:
    """Refuse R1 for a family whose norms do not commute with it, and what is built with R1 alone where it is left out.

    Raises:
        UserError: names the settings to change.
    """
    why = FAMILIES[model_type].without_r1
    if config.rotation.r1:
        if why:
            remedy = "set rotation.r1=false, which leaves R2 (merged), R3 and R4 (online) and GPTQ"
            raise UserError(f"R1 cannot rotate a {model_type}: {why}", remedy, shared=True)
        return
    for setting, problem, remedy in (
        ("optimize.scales=true", config.optimize.scales, "optimize.scales=false"),
        (f"optimize.w_bits={config.optimize.w_bits}", config.optimize.w_bits < 16, "optimize.w_bits=16"),
        (f"quantize.tune_steps={config.quantize.tune_steps}", config.quantize.tune_steps, "quantize.tune_steps=0"),
    ):
        if problem:
            raise UserError(f"{setting} needs R1, which rotation.r1=false leaves out", f"set {remedy}", shared=True)


def check_expert_settings(config: RunConfig, shape: Shape) -> None:
    """Refuse what is not built for a mixture of experts: learning from rounded weights, and weights in number formats.

    Raises:
        UserError: names the setting to change.
    """
    if not shape.experts:
        return
    if config.optimize.steps and config.optimize.w_bits < 16:
        problem = (
            f"optimize.w_bits={config.optimize.w_bits}, but with experts rotations are learned from 16-bit weights"
        )
        raise UserError(problem, "set optimize.w_bits=16, and quantize.method=gptq for the weights", shared=True)
    if config.quantize.tune_steps:
        raise UserError("quantize.tune_steps is for models without experts", "set it to 0", shared=True)
    if config.quant.w_format != "int" or config.quant.a_format != "int":
        problem = "a mixture of experts is quantised to integers, not to number formats"
        raise UserError(problem, "set quant.w_format=int and quant.a_format=int", shared=True)


def check_vocabulary(tokens: Tensor, shape: Shape, source: str) -> Tensor:
    """`tokens`, if the model has an embedding for each; pre-tokenised data may belong to another model.

    Raises:
        UserError: a token id is beyond the vocabulary.
    """
    highest = int(tokens.max())
    if highest >= shape.vocab:
        raise UserError(
            f"{source} holds token id {highest}, but the model's vocabulary has {shape.vocab}",
            "tokenise with this model's tokenizer",
            shared=True,
        )
    return tokens
