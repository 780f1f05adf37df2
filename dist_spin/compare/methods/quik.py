"""QUIK-4B (Ashkboos et al. 2023): the input columns with the largest activations stay at 16 bits, down_proj has 8 bits.

The outlier columns of a linear are those with the largest activation of the calibration text; q, k, v share theirs, as gate
and up do. Activations in those columns are exact as well, and take no part in the range of the others.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dist_spin.compare.methods.base import Figures, Method, States
from dist_spin.compare.methods.transformed_layer import State, TransformedRunner
from dist_spin.model.layer_inputs import READERS, LayerTask, maxima
from dist_spin.model.layers import LayerRunner
from dist_spin.model.sites_config import Sites

MIN_COLUMNS_PER_OUTLIER = 4  # at most a quarter of the columns: the published 256 would be half of a small model's
OUTLIER_SITES = ("attention", "mlp", "o")


class QUIK(Method):
    """A state has SITE.kept [n] int64 for `OUTLIER_SITES`: the indices of the outlier columns, ascending."""

    label = "QUIK-4B"
    settings_prefix = "quik_"
    depends_on_bits = False
    down_bits = 8

    def learn_layer(self, task: LayerTask) -> tuple[State, Figures]:
        """The figure is how many times the median column the smallest outlier column is, at the site with the smallest ratio."""
        largest, _ = maxima(task)
        state, ratios = State(), []
        for site in OUTLIER_SITES:
            count = min(self.config.methods.quik_columns, len(largest[site]) // MIN_COLUMNS_PER_OUTLIER)
            values, columns = largest[site].topk(count)
            state[f"{site}.kept"] = columns.sort().values
            ratios.append(float(values[-1] / largest[site].median()) if len(values) else 0.0)
        return state, {"least_to_median": min(ratios)}

    def runner(
        self, model_config: Any, sites: Sites, states: States, device: torch.device, dtype: torch.dtype
    ) -> LayerRunner:
        """As `Method.runner`; what down_proj reads has 8 bits where activations are quantised at all."""
        down = dataclasses.replace(sites.a, bits=self.down_bits) if sites.a.enabled else None
        return TransformedRunner(model_config, sites, states, device=device, dtype=dtype, down=down)

    def exact_columns(self, state: State) -> dict[str, Tensor]:
        """The outlier columns of each linear that has some."""
        return {role: state[f"{site}.kept"] for site in OUTLIER_SITES for role in READERS[site]}
