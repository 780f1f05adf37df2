"""The compared methods by the names they have in `compare.methods`. A new one is a file beside this and a row of the table."""

from dist_spin.compare.methods.affinequant import AffineQuant
from dist_spin.compare.methods.base import Method
from dist_spin.compare.methods.dartquant import DartQuant
from dist_spin.compare.methods.flatquant import FlatQuant
from dist_spin.compare.methods.llm_qat import LLMQAT
from dist_spin.compare.methods.omniquant import OmniQuant
from dist_spin.compare.methods.quik import QUIK
from dist_spin.compare.methods.smoothquant import SmoothQuant

METHODS: dict[str, type[Method]] = {
    "smoothquant": SmoothQuant,
    "omniquant": OmniQuant,
    "affinequant": AffineQuant,
    "quik": QUIK,
    "dartquant": DartQuant,
    "flatquant": FlatQuant,
    "llm_qat": LLMQAT,
}
