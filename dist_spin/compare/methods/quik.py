"""QUIK-4B (Ashkboos et al. 2023): the loudest input columns of each linear stay at 16 bits, down_proj is rounded to 8.

Columns are chosen by the largest activation of the calibration text; q, k, v share theirs, as gate and up do. Activations
of those columns are exact as well and take no part in the others' range.
"""

from torch import Tensor

from dist_spin.compare.methods.transformed_layer import State
from dist_spin.model.layer_inputs import READERS, LayerTask, maxima

DOWN_BITS = 8
MOST = 4  # at most one column in so many is kept: 256 of a small model's would be half of them


def learn_layer(task: LayerTask, columns: int) -> tuple[State, dict[str, float]]:
    """SITE.kept [n] int64 of attention, mlp and o, ascending; the figure is how much louder the quietest of them is.

    columns: how many are kept at each site.
    """
    largest, _ = maxima(task)
    state, ratios = State(), []
    for site in ("attention", "mlp", "o"):
        values, chosen = largest[site].topk(min(columns, len(largest[site]) // MOST))
        state[f"{site}.kept"] = chosen.sort().values
        ratios.append(float(values[-1] / largest[site].median()) if len(values) else 0.0)
    return state, {"least_to_median": min(ratios)}


def kept_columns(state: State) -> dict[str, Tensor]:
    """The exact columns of each linear that has some."""
    return {role: state[f"{site}.kept"] for site, roles in READERS.items() if f"{site}.kept" in state for role in roles}
