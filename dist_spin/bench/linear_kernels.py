"""Linear layers on the low-bit kernels that libraries ship, behind one call: y = x @ W.T for x [tokens, in].

    bf16   cuBLAS or oneDNN, what the others are compared with
    fp8    torch._scaled_mm, e4m3 weights per row and activations per token (Hopper and later)
    int8   weights per row and activations per token: torch._int_mm on a GPU, torchao's own linear on a CPU
    int4   weights alone, groups along the input: torchao's tile-packed tensor, that is tinygemm (GPU)
    w4a8   int4 weights in groups, int8 activations per token: torchao's quantiser, ExecuTorch's XNNPACK kernel (CPU)
    humming-w4a16, humming-w4a8, humming-w4afp8, humming-w4a4
           int4 weights in groups, activations in 16 bits, or int8, e4m3, int4 per token: the package humming-kernels (GPU), which
           vLLM serves integer activations with; it can apply a Hadamard in blocks where it rounds activations
    humming-nvfp4a16, humming-mxfp4a16, humming-mxfp4afp8
           likewise with weights in NVFP4 or MXFP4, activations in 16 bits or e4m3 per token; 4-bit ones need a Blackwell GPU

torchao's int8 linear is not used on a GPU because, outside a compiled graph, it copies the transposed weight at every call.
Weights are rounded to nearest: a benchmark asks how long the product takes, not how good the model is.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_spin.runtime.cpu_features import INT8_SATURATES, int8_is_exact

GROUP = {"int4": 128, "w4a8": 32, "humming": 128}  # input channels that share a scale: the libraries' usual choices
HUMMING = "humming-"
HUMMING_INPUTS = {"a16": "", "a8": "int8", "afp8": "float8e4m3", "a4": "int4"}  # its names of number formats
# As it calls them; a scale without a number format is held in bfloat16.
HUMMING_WEIGHTS: dict[str, dict[str, Any]] = {
    "w4": {"dtype": "int4", "group_size": GROUP["humming"]},
    "nvfp4": {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"},
    "mxfp4": {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"},
}
INT_MM_ROWS = 32  # the least number of rows given to torch._int_mm, which refuses 16 and fewer on CUDA


class Unavailable(Exception):
    """A kernel that this machine lacks; the message says in one line what is missing."""


class LinearKernel(Protocol):
    """A linear layer without bias. weight_bytes: what one pass over the weights reads."""

    weight_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, in] to [tokens, out], both in the dtype of the activations."""


def per_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, n] as e4m3 codes [tokens, n] and scales [tokens, 1], fp32."""
    return _scaled(x, torch.finfo(torch.float8_e4m3fn).max, torch.float8_e4m3fn)


def per_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, n] as int8 codes [tokens, n], symmetric, and scales [tokens, 1], fp32."""
    return _scaled(x, 127.0, torch.int8)


def _scaled(x: Tensor, highest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / highest
    codes = wide / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def rescale(sums: Tensor, token_scale: Tensor, row_scale: Tensor) -> Tensor:
    """int32 sums [tokens, out] as bfloat16 values; scales [tokens, 1] and [1, out]."""
    return (sums.float() * token_scale * row_scale).to(torch.bfloat16)


class Bf16:
    """The 16-bit product."""

    def __init__(self, weight: Tensor, fuse: Callable[[Any], Any]) -> None:
        self.weight = weight.to(torch.bfloat16)
        self.weight_bytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return (x.to(torch.bfloat16) @ self.weight.T).to(x.dtype)


class Fp8:
    """torch._scaled_mm with one scale per token and per row."""

    def __init__(self, weight: Tensor, fuse: Callable[[Any], Any]) -> None:
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (9, 0):
            raise Unavailable("needs a Hopper GPU or later")
        codes, scale = per_token_fp8(weight)
        self.codes, self.scale = codes, scale.T.contiguous()  # [out, in], [1, out]
        self.quantize = fuse(per_token_fp8)
        self.weight_bytes = codes.nbytes + scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self.quantize(x)
        return torch._scaled_mm(codes, self.codes.T, scale, self.scale, out_dtype=x.dtype, use_fast_accum=True)


class Int8:
    """torch._int_mm with one scale per token and per row."""

    def __init__(self, weight: Tensor, fuse: Callable[[Any], Any]) -> None:
        codes, scale = per_token_int8(weight)
        self.codes, self.scale = codes, scale.T.contiguous()  # [out, in], [1, out]
        self.quantize, self.rescale = fuse(per_token_int8), fuse(rescale)
        self.weight_bytes = codes.nbytes + scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = self.quantize(x)
        tokens = len(codes)
        if tokens < INT_MM_ROWS:
            codes = nn.functional.pad(codes, (0, 0, 0, INT_MM_ROWS - tokens))
        return self.rescale(torch._int_mm(codes, self.codes.T)[:tokens], scale, self.scale)


class TorchaoLinear:
    """A linear whose weight torchao has quantised."""

    def __init__(self, weight: Tensor, config: Any, weight_bytes: int, dtype: torch.dtype) -> None:
        self.linear = _torchao_linear(weight.to(dtype), config)
        self.dtype, self.weight_bytes = dtype, weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.dtype)).to(x.dtype)


class Xnnpack:
    """A linear quantised by torchao, lowered by ExecuTorch and run by its XNNPACK backend; fp32 activations outside."""

    def __init__(self, weight: Tensor, most_tokens: int) -> None:
        torchao = _torchao()
        if weight.device.type != "cpu":
            raise Unavailable("XNNPACK computes on the CPU")
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.extension.pybindings import portable_lib
        except ImportError as error:
            raise Unavailable("needs the package executorch") from error
        granularity = torchao.PerGroup(_group("w4a8", weight))
        config = torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=granularity,
        )
        linear = _torchao_linear(weight.float(), config)
        tokens = torch.export.Dim("tokens", min=1, max=max(2, most_tokens))
        example = (torch.zeros(2, weight.shape[1]),)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one another's deprecated parts
            program = torch.export.export(linear, example, dynamic_shapes=({0: tokens},))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        self.buffer = lowered.buffer  # the loaded program reads from it
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
        self.runtime = portable_lib._load_for_executorch_from_buffer(self.buffer)
        self.weight_bytes = weight.numel() // 2 + weight.numel() // granularity.group_size * 2

    def __call__(self, x: Tensor) -> Tensor:
        return self.runtime.forward((x.float().contiguous(),))[0].to(x.dtype)


class Humming:
    """A linear of humming-kernels, which compiles its kernels here: one for each number of rows that will come."""

    def __init__(self, weight: Tensor, weights: dict[str, Any], inputs: str, rows: Sequence[int]) -> None:
        if weight.device.type != "cuda":
            raise Unavailable("humming-kernels computes on a GPU")
        try:
            from humming.layer import HummingLayer
            from humming.tune import get_heuristics_class, get_heuristics_config
        except ImportError as error:
            raise Unavailable(f"needs the package humming-kernels ({error})") from error
        if inputs == "int4" and not get_heuristics_class(weight.device).b4_allowed_dtypes:
            raise Unavailable("humming-kernels has no product of 4-bit integer activations for this GPU")
        out, width = weight.shape
        group = weights["group_size"]
        _check_group(group, width)
        self.layer = HummingLayer(
            shape_n=out,
            shape_k=width,
            weight_config=dict(weights),
            input_config={"dtype": inputs} if inputs else None,
            torch_dtype=torch.bfloat16,
        ).to(weight.device)
        self.layer.load_from_unquantized(weight)
        self.layer.transform()
        self.weight_bytes = weight.numel() // 2 + weight.numel() // group * (1 if "scale_dtype" in weights else 2)
        # Left to itself it compiles kernels for every number of rows up to 8192.
        ends = sorted(set(rows))
        tuned = [get_heuristics_config(self.layer.humming_config, shape_m=end) for end in ends]
        self.tuning = json.dumps(list(zip([0, *ends], [*ends[:-1], 2**30], tuned, strict=False)))

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x, tuning_config=self.tuning)

    def rotated(self, x: Tensor, block: int) -> Tensor:
        """The product with x [tokens, in] turned by a normalised Sylvester Hadamard matrix in blocks of `block` channels."""
        return self.layer(x, tuning_config=self.tuning, hadamard_block_size=block)


def make(name: str, weight: Tensor, fuse: Callable[[Any], Any], rows: Sequence[int]) -> LinearKernel:
    """The kernel `name` with a bf16 weight [out, in], on its device.

    Args:
        fuse: compiles a chain of elementwise operations, or hands it back as it is.
        rows: the numbers of rows of x that will come.

    Raises:
        Unavailable: the device, an instruction, a package or a size it needs is missing.
    """
    on_gpu = weight.device.type == "cuda"
    if name == "bf16":
        return Bf16(weight, fuse)
    if name == "fp8":
        return Fp8(weight, fuse)
    if name == "int8" and on_gpu:
        return Int8(weight, fuse)
    if name == "int8":
        if not int8_is_exact():
            raise Unavailable(INT8_SATURATES)
        config = _torchao().Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        return TorchaoLinear(weight, config, weight.numel(), torch.float32)
    if name == "int4" and on_gpu:
        torchao = _torchao()
        group = _group("int4", weight)
        config = torchao.Int4WeightOnlyConfig(
            group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
        return TorchaoLinear(weight, config, weight.numel() // 2 + weight.numel() // group * 4, torch.bfloat16)
    if name == "int4":
        raise Unavailable("tinygemm computes on a GPU")
    if name.startswith(HUMMING):
        weights, _, inputs = name.removeprefix(HUMMING).partition("a")
        return Humming(weight, HUMMING_WEIGHTS[weights], HUMMING_INPUTS[f"a{inputs}"], rows)
    return Xnnpack(weight, max(rows))


def relative_error(
    kernel: LinearKernel,
    weight: Tensor,
    tokens: int = 64,
    turn: Callable[[Tensor], Tensor] | None = None,
    block: int = 0,
) -> float:
    """|y - x W.T| / |x W.T| of a kernel on random x: shows that it computes the product, and how coarsely.

    turn: what the kernel is to do to x [tokens, in] before, in blocks of `block` channels.
    """
    generator = torch.Generator(weight.device).manual_seed(1)
    x = torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device)
    exact = (x if turn is None else turn(x)) @ weight.float().T
    narrow = x.to(torch.bfloat16)
    y = kernel.rotated(narrow, block) if block else kernel(narrow)  # type: ignore[attr-defined]
    return float((y.float() - exact).norm() / exact.norm())


def _group(name: str, weight: Tensor) -> int:
    _check_group(GROUP[name], weight.shape[1])
    return GROUP[name]


def _check_group(group: int, width: int) -> None:
    if width % group:
        raise Unavailable(f"groups of {group} do not divide {width} input channels")


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise Unavailable("needs the package torchao") from error
    return torchao.quantization


def _torchao_linear(weight: Tensor, config: Any) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    _torchao().quantize_(linear, config)
    return linear
