"""Published WikiText-2 perplexities at W4A4KV4 (windows of 2048 tokens), to stand beside ours.

Sources: Liu et al. 2024 (SpinQuant), Ashkboos et al. 2024 (QuaRot), Sun et al. 2024 (FlatQuant) and the papers of the other
methods, as these report one another.
"""

import re

MODELS = ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "Llama-3-8B", "Llama-3-70B")

# (system, weights by) -> perplexity of each of MODELS; None where nothing was published.
W4A4KV4: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("full precision", "none"): (5.47, 4.88, 3.32, 6.14, 2.86),
    ("SmoothQuant", "rtn"): (83.12, 35.88, 26.01, 210.19, 9.60),
    ("OmniQuant", "rtn"): (14.74, 12.28, None, None, None),
    ("AffineQuant", "rtn"): (12.69, 11.45, None, None, None),
    ("QUIK-4B", "gptq"): (8.87, 7.78, 6.91, None, None),
    ("QuaRot", "rtn"): (8.56, 6.10, 4.14, 10.60, 55.44),
    ("QuaRot", "gptq"): (6.10, 5.40, 3.79, 8.16, 6.60),
    ("SpinQuant (had)", "rtn"): (6.14, 5.44, 3.82, 7.96, 7.58),
    ("SpinQuant (had)", "gptq"): (5.96, 5.24, 3.70, 7.39, 6.21),
    ("DartQuant", "gptq"): (5.93, 5.26, None, 7.43, 4.92),
    ("OSTQuant", "gptq"): (5.91, 5.25, 3.67, 7.29, 4.55),
    ("FlatQuant", "rtn"): (5.79, 5.12, 3.55, 6.98, 3.78),
    ("FlatQuant", "gptq"): (5.78, 5.11, 3.54, 6.90, 3.77),
}

# Which published system one of our rows repeats, where the names differ.
SAME = {"learned rotation": "SpinQuant (had)", "ours": "SpinQuant (had)"}


def known_model(path: str) -> str | None:
    """Which of MODELS a model path or hub id names; None for any other, such as a chat model or a later release."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    if re.search(r"instruct|chat|guard", name):
        return None
    match = re.search(r"llama-?([23])-(\d+)b(?![a-z0-9.])", name)
    model = f"Llama-{match[1]}-{match[2]}B" if match else None
    return model if model in MODELS else None


def published(model: str | None, system: str, weights: str) -> float | None:
    """The published perplexity of a system on a model, if there is one."""
    if model is None:
        return None
    values = W4A4KV4.get((SAME.get(system, system), weights))
    return None if values is None else values[MODELS.index(model)]


def published_rows(model: str) -> list[tuple[str, str, float]]:
    """(system, weights, perplexity) of everything published for a model."""
    at = MODELS.index(model)
    return [(*key, value) for key, values in W4A4KV4.items() if (value := values[at]) is not None]
