"""Which settings the runtimes of an export format accept.

Every stage that computes something asks once, at its start, for `export.target`; `export` asks for the format it writes.
"""

import typing
from collections.abc import Iterator
from typing import Any

from dist_spin.config.export import ExportConfig
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape, layer_kinds
from dist_spin.model.context import context_length
from dist_spin.model.families import FAMILIES
from dist_spin.runtime.progress import say

FORMATS = typing.get_args(ExportConfig.__annotations__["target"])[1:]  # all but "none"
QUANTISED = ("compressed-tensors", "executorch")  # formats whose weights come from the quantised layers
PACKED_BITS = (4, 8)  # of weights, that kernels read


def check_export_target(config: RunConfig, model: Any) -> None:
    """Refuse settings whose result could not be exported as `export.target`, before a stage computes anything with them.

    Args:
        model: its config, from transformers.

    Raises:
        UserError: see `check_target`.
    """
    if config.export.target != "none":
        check_target(config.export.target, config, model, starting=True)


def tell_exportable(config: RunConfig, model: Any) -> None:
    """Say as what the result of a run without `export.target` can be exported; said when its first stage begins to compute.

    model: its config, from transformers.
    """
    if config.export.target == "none":
        say(exportable(config, model))


def check_target(target: str, config: RunConfig, model: Any, *, starting: bool) -> None:
    """Refuse settings whose result no runtime of the format `target` would load, or would run as something else.

    Args:
        model: its config, from transformers.
        starting: the run is yet to be made; what is learned with R4 is then refused where R4 would be left out, although
            16-bit weights could be exported without it.

    Raises:
        UserError: names every setting in the way, and what to set instead.
    """
    found = list(conflicts(target, config, model, starting=starting))
    if len(found) == 1:
        raise found[0]
    if found:
        problems = "; ".join(f"({number}) {error.problem}: {error.remedy}" for number, error in enumerate(found, 1))
        raise UserError(f"{len(found)} settings do not fit {target}: {problems}", "change them all")


GGUF_ROPE = ("default", "linear", "yarn", "llama3")  # what llama.cpp's Llama applies


def exportable(config: RunConfig, model: Any) -> str:
    """One line on the formats that the result of a run without `export.target` can be exported as.

    model: its config, from transformers.
    """
    found = {}
    for target in FORMATS:
        errors = [
            *conflicts(target, config, model, starting=False),
            *_of_clips(target, config, clips=config.optimize.clips),
        ]
        found[target] = len(errors)
    fitting = ", ".join(target for target, count in found.items() if not count) or "nothing"
    others = ", ".join(f"{target} ({count})" for target, count in found.items() if count)
    more = (
        f"; not as {others}: so many settings are in the way, which export.target=FORMAT names at once"
        if others
        else ""
    )
    return f"the result can be exported as {fitting}{more}"


def conflicts(target: str, config: RunConfig, model: Any, *, starting: bool) -> Iterator[UserError]:
    """Every setting in the way of an export as `target`; see `check_target`."""
    online, profile, shape = config.rotation.online, config.export.profile, Shape.of(model)
    if shape.experts and target not in ("hf", "compressed-tensors"):
        yield UserError(
            f"a mixture of experts is not exported as {target}", "set export.target=hf or compressed-tensors"
        )
    if model.model_type == "gpt_oss" and target == "compressed-tensors":
        problem = "packed experts of gpt-oss are read by no loader: theirs take its own MXFP4 or 16 bits"
        yield UserError(problem, "set export.target=hf, whose weights are not rounded")
    if shape.experts and profile != "no-had":
        yield UserError(
            "a mixture of experts is exported without online Hadamards alone, which engines do not apply to experts",
            "set export.profile=no-had, with rotation.online=false",
        )
    if profile == "r4-block" and target == "gguf":
        yield UserError("llama.cpp applies no Hadamard before down_proj", "use export.profile=no-had")
    elif profile == "r4-block" and not online:
        yield UserError("export.profile=r4-block exports R4, but rotation.online=false", "set rotation.online=true")
    elif profile == "no-had" and online and (starting or target in QUANTISED):
        other = "" if target == "gguf" else ", or export.profile=r4-block"
        problem = f"{target} with export.profile=no-had has no online Hadamards, but rotation.online=true"
        yield UserError(problem, f"set rotation.online=false{other}")
    if target == "gguf":
        yield from _of_gguf(model)
    if target == "compressed-tensors":
        yield from _of_compressed_tensors(config, shape)
    if target in QUANTISED:
        yield from _of_formats(target, config)
    if target == "executorch" and not config.rotation.r1:
        yield UserError("executorch is written with the gains of norms folded, which R1 does", "set rotation.r1=true")
    if target == "executorch":
        try:
            model_params(model, config.quant.w_group_size)
        except UserError as error:
            yield error
        yield from _of_executorch(config, shape)
    if starting:
        yield from _of_clips(target, config, clips=config.optimize.clips)


def check_clips(target: str, config: RunConfig, *, clips: bool) -> None:
    """Refuse learned clips of activations that a runtime quantises: none takes a part of the range.

    Elsewhere clips belong to quantisers that `dist_spin.load` alone puts back, with their clips.

    Args:
        clips: whether clips were, or are to be, learned.

    Raises:
        UserError: they have no place in the format `target`.
    """
    for error in _of_clips(target, config, clips=clips):
        raise error


def _of_clips(target: str, config: RunConfig, *, clips: bool) -> Iterator[UserError]:
    if clips and target in QUANTISED and config.quant.a_bits < 16:
        problem = f"learned clips have no place in {target}, whose runtimes quantise the whole range of an activation"
        yield UserError(problem, "learn with optimize.clips=false")


def _of_formats(target: str, config: RunConfig) -> Iterator[UserError]:
    """Number formats that a target, or its kernels, have no place for: a weight's decides, and the inputs' goes with it."""
    w, a = config.quant.w_format, config.quant.a_format if config.quant.a_bits < 16 else "int"
    if target == "executorch" and (w, a) != ("int", "int"):
        yield UserError(f"executorch is for integers, not for quant.w_format={w}, quant.a_format={a}", "export as hf")
    elif target == "compressed-tensors" and a != w and config.quant.a_bits < 16:
        problem = f"kernels for compressed-tensors take no quant.a_format={a} beside quant.w_format={w}"
        yield UserError(problem, f"set quant.a_format={w}, or quant.a_bits=16")


def _of_compressed_tensors(config: RunConfig, shape: Shape) -> Iterator[UserError]:
    q, block = config.quant, config.rotation.r4_size or shape.intermediate
    if config.rotation.online and config.export.profile == "r4-block" and block & (block - 1):
        problem = f"compressed-tensors applies Hadamards whose size is a power of two, not {block}"
        yield UserError(problem, f"set rotation.r4_block={shape.intermediate & -shape.intermediate}")
    if config.quantize.method == "none" or q.w_bits not in PACKED_BITS or q.down_bits not in (0, *PACKED_BITS):
        yield UserError(
            "kernels for compressed-tensors read weights of 4 or 8 bits",
            "set quant.w_bits and quant.down_bits so, with quantize.method=gptq or rtn; or export as hf",
        )
    if q.a_bits == 16:
        return
    if q.a_bits not in PACKED_BITS:
        yield UserError(
            "kernels for compressed-tensors read activations of 4 or 8 bits", "set quant.a_bits so, or to 16"
        )
    wanted = {"o_per_head": False, "a_clip_ratio": 1.0, "w_symmetric": True}
    wanted |= {"a_symmetric": True} if q.a_format == "int" else {}  # the others are symmetric
    for setting, value in wanted.items():
        if getattr(q, setting) != value:
            problem = (
                f"quant.{setting}={getattr(q, setting)} has no place in compressed-tensors beside quantised activations"
            )
            yield UserError(problem, f"learn and quantise with quant.{setting}={value}".lower())


def _of_gguf(model: Any) -> Iterator[UserError]:
    """What llama.cpp's network of a model read as Llama or Mistral leaves out, without a word."""
    remedy = "set export.target=hf, for transformers and `dist_spin.load`"
    if FAMILIES[model.model_type].without_r1:
        yield UserError(f"what llama.cpp computes of a {model.model_type} was not compared with it", remedy)
    window, context = getattr(model, "sliding_window", None), context_length(model)
    if window and (context is None or window < context) and "sliding_attention" in layer_kinds(model):
        yield UserError(f"llama.cpp gives a {model.model_type} no sliding window, but it has one of {window}", remedy)
    if model.model_type not in ("llama", "mistral"):
        return
    if model.hidden_act != "silu":
        yield UserError(f"llama.cpp computes silu in a {model.model_type}'s MLP, not {model.hidden_act}", remedy)
    scaling = (model.rope_parameters or {}).get("rope_type", "default")
    if scaling not in GGUF_ROPE:
        problem = f"llama.cpp reads no factors of rope_type={scaling} in a {model.model_type}"
        yield UserError(problem, remedy)


def _of_executorch(config: RunConfig, shape: Shape) -> Iterator[UserError]:
    """What the loader's kernels ("8da4w") and its Hadamard take; sizes of 28 * 2^k give a wrong transform, others garbage."""
    q = config.quant
    rows = {"hidden": shape.hidden, "intermediate": shape.intermediate, "query": shape.heads * shape.head_dim}
    if config.rotation.online and (shape.intermediate & (shape.intermediate - 1) or config.rotation.r4_size):
        which = "r4_block" if config.rotation.r4_block else "block"
        what = f"rotation.{which}={config.rotation.r4_size}" if config.rotation.r4_size else f"{shape.intermediate}"
        yield UserError(
            f"executorch applies R4 to all of an intermediate size that is a power of two, not {what}",
            "set rotation.online=false, with export.profile=no-had",
        )
    wanted: dict[str, tuple[Any, ...]] = {
        "w_bits": (4,),
        "down_bits": (0, 4),
        "w_symmetric": (True,),
        "w_group_size": (32, 64, 128, 256),
        "a_bits": (8,),
        "a_symmetric": (False,),
        "a_group_size": (0,),
        "a_clip_ratio": (1.0,),
        "o_per_head": (False,),
        "k_bits": (16,),
        "v_bits": (16,),
        "embedding_bits": (8, 16),
        "head_bits": (8, 16),
    }
    for setting, accepted in wanted.items():
        if (value := getattr(q, setting)) not in accepted:
            choices = " or ".join(str(choice).lower() for choice in accepted)
            problem = f"quant.{setting}={value} has no place in executorch's 4-bit Llama"
            yield UserError(problem, f"learn and quantise with quant.{setting}={choices}")
    if config.quantize.method == "none":
        yield UserError("executorch takes weights of 4 bits", "set quantize.method=gptq or rtn")
    for name, size in rows.items():
        # Its loader squeezes the scales, so that one group a row does not load.
        if q.w_group_size and (size % q.w_group_size or size == q.w_group_size):
            what = f"quant.w_group_size={q.w_group_size} does not cut the {name} size {size} into two groups or more"
            yield UserError(what, "use 32, 64 or 128" if size % 32 == 0 and size > 32 else "use another model")
            return


# What ExecuTorch's Llama 3.1 scaling of the position embedding has fixed.
SCALED_ROPE = {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def model_params(config: Any, group_size: int) -> dict[str, Any]:
    """params.json of a Llama config from transformers.

    Raises:
        UserError: the loader's Llama cannot compute this model.
    """
    shape = Shape.of(config)
    for problem in (
        config.model_type not in ("llama", "mistral") and f"architecture '{config.model_type}'",
        getattr(config, "sliding_window", None) and "a sliding window",
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)) and "biases",
        (activation := getattr(config, "hidden_act", "another")) != "silu" and f"the activation {activation}",
    ):
        if problem:
            raise UserError(f"executorch's pre-quantised loader has no place for {problem}", "use a Llama model")
    rope = config.rope_parameters
    kind = rope["rope_type"]
    scaled = {}
    if kind == "llama3" and all(rope[name] == value for name, value in SCALED_ROPE.items()):
        factors = (rope["factor"], rope["high_freq_factor"])
        scaled = {"use_scaled_rope": True, "rope_scale_factor": int(factors[0]), "high_freq_factor": int(factors[1])}
    elif kind != "default":
        raise UserError(f"executorch's Llama has no position embedding of type {kind} like this", "use another model")
    return {
        "dim": shape.hidden,
        "hidden_dim": shape.intermediate,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        **scaled,
        "quantization_args": {"group_size": group_size},
    }
