"""How many tokens a model takes at once; nothing here imports torch."""

from typing import Any

from dist_spin.errors import UserError


def context_length(config: Any) -> int | None:
    """Tokens of a model's context, from its transformers config or config.json; None where neither says."""
    name = "max_position_embeddings"
    length = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return length if isinstance(length, int) and length > 0 else None


def check_context(setting: str, tokens: int, config: Any) -> None:
    """Refuse sequences that are longer than the context the model was made for.

    Args:
        setting: that gives their length, such as optimize.seq_len. config: as for `context_length`.

    Raises:
        UserError: names the setting and the longest length.
    """
    context = context_length(config)
    if context is not None and tokens > context:
        problem = f"{setting}={tokens} is longer than the model's context of {context} tokens"
        raise UserError(f"{problem} (max_position_embeddings)", f"set {setting}={context} or less", shared=True)
