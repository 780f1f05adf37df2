"""What each part of a run cannot do without: the operations of its products, and the bytes that it has to read.

From them follows a floor, the seconds that a part would take if it did nothing else and overlapped both perfectly.
"""

from dataclasses import dataclass

from dist_spin.bench.scaling_model import DTYPE, layer_flop, mean_layer_bytes
from dist_spin.config.run import RunConfig
from dist_spin.model.architecture import Shape

SCALE_BYTES = 4  # scales of quantised weights are fp32 in our files, whatever their number format


@dataclass(frozen=True)
class Cost:
    """flop: of products, nothing computed twice. read, written: bytes of weights, each once."""

    flop: float
    read: float
    written: float = 0.0

    def floor(self, gpus: int, matmul: float, copy: float) -> float:
        """Seconds on `gpus` devices of `matmul` FLOP/s each, to which `copy` bytes/s lead from host memory."""
        return max(self.flop / (gpus * matmul), self.read / (gpus * copy))


def vocab_bytes(shape: Shape) -> float:
    """Bytes of the embedding and lm_head."""
    return 2 * shape.vocab * shape.hidden * DTYPE.itemsize


def model_bytes(shape: Shape) -> float:
    """Bytes of the 16-bit model."""
    return shape.layers * mean_layer_bytes(shape) + vocab_bytes(shape)


def code_bytes(shape: Shape, config: RunConfig) -> float:
    """Bytes of all quantised layers: 4-bit codes two to a byte, others one each, and their scales."""
    q = config.quant

    def of_layer(layer: Shape) -> float:
        total = 0.0
        for index, (columns, rows, count, _) in enumerate(layer.products):
            is_down = index >= 2 and index % 2 == 1  # attention's two come first, then up and down of every kind of MLP
            bits = (q.down_bits if is_down else 0) or q.w_bits
            scales = count * rows * columns / (q.weights_per_scale or columns) * (1 if q.w_symmetric else 2)
            total += count * rows * columns / (2 if bits == 4 else 1) + scales * SCALE_BYTES
        return total

    return shape.layers * shape.mean(of_layer)


def forward_flop(shape: Shape, seq_len: int) -> float:
    """Operations per token of all decoder layers, nothing rotated."""
    return shape.layers * (layer_flop(shape, seq_len, 8)[0])


def hessian_flop(shape: Shape) -> float:
    """Operations per token of every layer's Hessians, of which one half is the other's mirror image."""
    return shape.layers * shape.mean(
        lambda layer: sum(count * share * inputs**2 for inputs, _, count, share in layer.products)
    )


def costs(config: RunConfig, shape: Shape, evaluated_tokens: int) -> dict[str, Cost]:
    """Of each part of a run.

    Args:
        evaluated_tokens: tokens of all texts that are measured.
    """
    o, q = config.optimize, config.quantize
    head = 2 * shape.vocab * shape.hidden  # operations per token, forward
    learned = shape.layers * sum(layer_flop(shape, o.seq_len, o.w_bits)) + 2 * head
    calibration = q.n_sequences * q.seq_len
    codes, whole, ends = code_bytes(shape, config), model_bytes(shape), vocab_bytes(shape)
    quantised = q.method != "none" and config.quant.w_bits < 16
    rotations = 1 + len(q.baselines)
    sixteen_bit = 1 + (rotations if config.evaluate.unquantized_weights or not quantised else 0)
    measured = sixteen_bit + (rotations if quantised else 0)
    forward = forward_flop(shape, config.evaluate.seq_len) + head
    gptq = forward_flop(shape, q.seq_len) + hessian_flop(shape)
    return {
        "optimize": Cost(o.steps * o.batch_size * o.seq_len * learned, whole),
        "quantize": Cost(
            rotations * calibration * gptq if q.method == "gptq" else 0.0, rotations * whole, rotations * codes
        ),
        "evaluate": Cost(
            evaluated_tokens * (measured * forward + (measured - 1) * head * config.evaluate.fidelity),
            sixteen_bit * whole + (measured - sixteen_bit) * (codes + ends),
        ),
        "compressed-tensors": Cost(0.0, codes + ends, codes + ends),
        "hf": Cost(0.0, whole, whole),
    }
