"""AffineQuant (Ma et al. 2024): OmniQuant with a whole matrix from v_proj to o_proj in place of a scale per channel.

The matrix is kept strictly diagonally dominant, and therefore invertible; its band grows from the diagonal outwards while it
is learned. It merges into weights.
"""

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.omniquant import OmniParameters, OmniQuant
from dist_spin.numerics.gptq import GPTQOptions

DOMINANCE = 0.9  # bound of the sum of a row's other entries, as a share of its diagonal entry


class AffineParameters(OmniParameters):
    """Those of OmniQuant, and the entries of the matrix beside its diagonal."""

    def __init__(
        self, scales: dict[str, Tensor], head_dim: int, weights: dict[str, Tensor], options: dict[str, GPTQOptions]
    ) -> None:
        super().__init__(scales, head_dim, weights, options)
        like = scales["attention"]
        self.off_diagonal = nn.Parameter(like.new_zeros(head_dim, head_dim))
        position = torch.arange(head_dim, device=like.device)
        self.distance = (position[:, None] - position[None, :]).abs()  # from the diagonal
        self.band = torch.zeros((), dtype=torch.long, device=like.device)  # in place, so that a recorded step sees it

    def value_matrix(self) -> tuple[Tensor, Tensor]:
        """As `OmniParameters.value_matrix`; entries outside the band are 0."""
        values = self.log_values.exp()
        entries = torch.where((self.distance > 0) & (self.distance <= self.band), self.off_diagonal, 0)
        entries = DOMINANCE * entries / entries.abs().sum(-1, keepdim=True).clamp(min=1)
        matrix = values[:, None] * (torch.eye(len(values), dtype=entries.dtype, device=entries.device) + entries)
        return matrix, torch.linalg.inv_ex(matrix)[0].mT

    def transforms(self) -> list[nn.Parameter]:
        """See `LayerParameters`."""
        return [*super().transforms(), self.off_diagonal]

    def start_epoch(self, progress: float) -> None:
        """The band reaches every entry before the last tenth of the epochs."""
        self.band.fill_(round(len(self.distance) * min(1.0, progress + 0.1)))


class AffineQuant(OmniQuant):
    """A state as OmniQuant's, where value.left is no longer diagonal."""

    label = "AffineQuant"
    parameters_class = AffineParameters
