"""The sequence lengths of a run beside the context of its model, as far as this machine has the model's config.json."""

import contextlib
from pathlib import Path
from typing import Any

from dist_spin.config.run import RunConfig, reading_stages
from dist_spin.errors import UserError
from dist_spin.model.checkpoint_headers import check_config
from dist_spin.model.context import check_context, context_length


def sequence_lengths(config: RunConfig) -> dict[str, int | None]:
    """Tokens of a sequence for each stage that reads text, and under "context" what the model takes; None where unknown."""
    lengths: dict[str, int | None] = {stage: getattr(config, stage).seq_len for stage in reading_stages(config)}
    return {**lengths, "context": context_length(_model_config(config))}


def too_long(lengths: dict[str, int | None]) -> list[str]:
    """What the stages say of sequences that are longer than the context."""
    problems = []
    for stage, tokens in lengths.items():
        try:
            if tokens is not None and stage != "context":
                check_context(f"{stage}.seq_len", tokens, {"max_position_embeddings": lengths["context"]})
        except UserError as error:
            problems.append(str(error))
    return problems


def _model_config(config: RunConfig) -> dict[str, Any]:
    """config.json of the model's directory, or of its copy in the hub's cache; {} where it is in neither, as for GGUF files."""
    path = Path(config.model_path)
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = None
        with contextlib.suppress(ValueError):  # no hub id
            cached = try_to_load_from_cache(config.model.path, "config.json", revision=config.model.revision)
        if not isinstance(cached, str):
            return {}
        path = Path(cached).parent
    try:
        return check_config(path, dummy=True)
    except UserError:
        return {}
