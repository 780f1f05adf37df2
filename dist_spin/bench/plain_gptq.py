"""GPTQ as its paper writes it, one column at a time in plain PyTorch: what the product's solver is compared with.

Same scales, damping, blocks and arithmetic (fp32); no tiles, no fused kernels, no reversed factorisation.
"""

import torch
from torch import Tensor

from dist_spin.numerics.gptq import GPTQOptions, QuantizedWeight
from dist_spin.numerics.quantizer import code_dtype, code_range, weight_scales


@torch.no_grad()
def plain_gptq(w: Tensor, hessian: Tensor, options: GPTQOptions) -> QuantizedWeight:
    """Quantise w [out, in] (Frantar et al. 2022, algorithm 1), columns from left to right, every input live."""
    lowest, highest = code_range(options.bits, symmetric=options.symmetric)
    columns = w.shape[1]
    group = options.group_size or columns
    w = w.to(hessian.dtype).clone()
    damped = hessian + options.percdamp * hessian.diagonal().mean() * torch.eye(
        columns, dtype=hessian.dtype, device=w.device
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(w.shape, dtype=code_dtype(options.bits, symmetric=options.symmetric), device=w.device)
    bits, symmetric, clip, norm = options.bits, options.symmetric, options.mse_clip, options.clip_norm
    scale, zero = weight_scales(w, bits, symmetric=symmetric, group_size=options.group_size, mse_clip=clip, norm=norm)
    for start in range(0, columns, options.block_size):
        stop = min(start + options.block_size, columns)
        block = w[:, start:stop].clone()
        errors = torch.zeros_like(block)
        factor = upper[start:stop, start:stop]
        for j in range(stop - start):
            g = (start + j) // group
            if options.group_size and (start + j) % group == 0:
                later = torch.cat([block[:, j:], w[:, stop:]], 1)[:, :group]
                fitted = weight_scales(later, bits, symmetric=symmetric, group_size=0, mse_clip=clip, norm=norm)
                scale[:, g], zero[:, g] = fitted[0][:, 0], fitted[1][:, 0]
            s, z = scale[:, g], zero[:, g]
            code = torch.clamp(torch.round(block[:, j] / s) + z, lowest, highest)
            codes[:, start + j] = code.to(codes.dtype)
            errors[:, j] = (block[:, j] - (code - z) * s) / factor[j, j]
            block[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return QuantizedWeight(codes, scale, zero)
