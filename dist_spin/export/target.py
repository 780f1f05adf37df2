"""Which settings a format's runtimes accept; asked when a run starts (`export.target`) and again when it is exported."""

from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.settings import RunConfig

PACKED_BITS = (4, 8)  # of weights, that kernels read


def check_target(target: str, config: RunConfig, shape: Shape, *, starting: bool) -> None:
    """Refuse settings whose result no runtime of the format `target` would load, or would run as something else.

    Args:
        starting: the run is yet to be made; what is learned with R4 is then refused where R4 would be left out, although
            16-bit weights could be exported without it.

    Raises:
        UserError: names the first setting in the way and what to set instead.
    """
    online, profile = config.rotation.online, config.export.profile
    if profile == "r4-block" and target == "gguf":
        raise UserError("llama.cpp applies no Hadamard before down_proj", "use export.profile=no-had")
    if profile == "r4-block" and not online:
        raise UserError("export.profile=r4-block exports R4, but rotation.online=false", "set rotation.online=true")
    if profile == "no-had" and online and (starting or target == "compressed-tensors"):
        other = "" if target == "gguf" else ", or export.profile=r4-block"
        problem = f"{target} with export.profile=no-had has no online Hadamards, but rotation.online=true"
        raise UserError(problem, f"set rotation.online=false{other}")
    if target == "compressed-tensors":
        _check_compressed_tensors(config, shape)


def _check_compressed_tensors(config: RunConfig, shape: Shape) -> None:
    q, block = config.quant, config.rotation.r4_block or shape.intermediate
    if config.rotation.online and block & (block - 1):
        problem = f"compressed-tensors applies Hadamards whose size is a power of two, not {block}"
        raise UserError(problem, f"set rotation.r4_block={shape.intermediate & -shape.intermediate}")
    if config.quantize.method == "none" or q.w_bits not in PACKED_BITS or q.down_bits not in (0, *PACKED_BITS):
        raise UserError(
            "kernels for compressed-tensors read weights of 4 or 8 bits",
            "set quant.w_bits and quant.down_bits so, with quantize.method=gptq or rtn; or export as hf",
        )
    if q.a_bits == 16:
        return
    if q.a_bits not in PACKED_BITS:
        raise UserError(
            "kernels for compressed-tensors read activations of 4 or 8 bits", "set quant.a_bits so, or to 16"
        )
    wanted = {"a_symmetric": True, "o_per_head": False, "a_clip_ratio": 1.0, "w_symmetric": True}
    for setting, value in wanted.items():
        if getattr(q, setting) != value:
            problem = (
                f"quant.{setting}={getattr(q, setting)} has no place in compressed-tensors beside quantised activations"
            )
            raise UserError(problem, f"learn and quantise with quant.{setting}={value}".lower())
