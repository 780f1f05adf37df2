"""What families do to embeddings and logits beside multiplying: factors and a soft cap, which no weight holds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALED_EMBEDDING = ("gemma2", "gemma3_text")
SOFT_CAP = ("gemma2", "gemma3_text")
SCALED_LOGITS = ("cohere", "cohere2")


@dataclass(frozen=True)
class Scaling:
    """embedding: factor of embedded tokens. logits: factor of lm_head's output. cap: logits are cap tanh(logits / cap); 0: no."""

    embedding: float = 1.0
    logits: float = 1.0
    cap: float = 0.0

    @staticmethod
    def of(config: Any) -> "Scaling":
        """Read from a transformers config; entries that its family does not know are not read."""
        kind = config.model_type
        return Scaling(
            embedding=config.hidden_size**0.5 if kind in SCALED_EMBEDDING else 1.0,
            logits=float(config.logit_scale) if kind in SCALED_LOGITS else 1.0,
            cap=float(config.final_logit_softcapping or 0) if kind in SOFT_CAP else 0.0,
        )

    def embedded(self, rows: Tensor) -> Tensor:
        """Rows of the embedding [..., h] as the first layer reads them; the factor is rounded to their dtype, as in training."""
        if self.embedding == 1:
            return rows
        return rows * torch.tensor(self.embedding, dtype=rows.dtype, device=rows.device)

    def logits_of(self, product: Tensor) -> Tensor:
        """Logits of lm_head's output [..., vocab]; `product` itself where nothing is done to it."""
        if self.logits != 1:
            product = product * self.logits
        return product if not self.cap else self.cap * torch.tanh(product / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of `logits_of`, from its result."""
        return self.logits * (1 - (logits / self.cap) ** 2) if self.cap else self.logits


NOT_SCALED = Scaling()
