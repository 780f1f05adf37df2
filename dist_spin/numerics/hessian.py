"""The second moments of a linear's input, summed over tokens, as GPTQ needs them."""

import torch
from torch import Tensor

TOKEN_CHUNK = 8192  # tokens per product
LEAST_PANEL = 2048  # columns; narrower panels would keep a GPU less busy than the work they save
PANELS = 8  # a symmetric product computed in 8 panels of its upper block triangle takes 9/16 of the work


class Hessian:
    """Sum of x xᵀ over tokens. `total` [in, in] and `count` are raw sums, so that those of several ranks add up.

    The order of summation is fixed by the order of `add` calls alone. `dtype` is fp32, or fp64 for exact comparisons. On
    a GPU, half-precision inputs fill only the upper block triangle of `total`; `mean` mirrors it.
    """

    def __init__(
        self, features: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self.total = torch.zeros(features, features, dtype=dtype, device=device)
        self.count = 0  # tokens

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the tokens of x [..., in]. bf16 and fp16 products are exact in fp32: nothing is rounded to half.

        Raises ValueError when the last dimension of x is not `features`.
        """
        features = len(self.total)
        if x.shape[-1] != features:
            raise ValueError(f"inputs have {x.shape[-1]} features, the Hessian {features}")
        tokens = x.reshape(-1, features)
        half = x.dtype in (torch.bfloat16, torch.float16)
        on_tensor_cores = half and x.is_cuda and self.total.dtype == torch.float32
        for chunk in tokens.split(TOKEN_CHUNK):
            if on_tensor_cores:
                for start, stop in self._panels():
                    product = torch.mm(chunk[:, start:stop].T, chunk[:, start:], out_dtype=torch.float32)
                    self.total[start:stop, start:] += product
            else:
                chunk = chunk.to(self.total.dtype)
                self.total.addmm_(chunk.T, chunk)
        self.count += tokens.shape[0]

    def mean(self) -> Tensor:
        """H = (2/n) Σ x xᵀ, [in, in]. Raises ValueError when no token was added."""
        if not self.count:
            raise ValueError("the Hessian holds no tokens")
        mean = self.total * (2 / self.count)
        if mean.is_cuda:
            for start, stop in self._panels():
                mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean

    def _panels(self) -> list[tuple[int, int]]:
        """(start, stop) of the columns whose products are computed together."""
        features = len(self.total)
        width = max(LEAST_PANEL, -(-features // PANELS))
        return [(start, min(start + width, features)) for start in range(0, features, width)]
