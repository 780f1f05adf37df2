"""One check when a model is opened: the files' headers hold every tensor that its architecture needs, in its shape."""

from pathlib import Path
from typing import Any

from dist_spin.errors import UserError
from dist_spin.model.architecture import EMBEDDING, HEAD, skeleton
from dist_spin.model.checkpoint_headers import (
    DOWNLOAD_AGAIN,
    FLOAT_DTYPES,
    StoredTensor,
    check_not_quantised,
    first_line,
)

HEAD_WEIGHT, EMBEDDING_WEIGHT = f"{HEAD}.weight", f"{EMBEDDING}.weight"
LAYERS = "model.layers."
NOT_PARAMETERS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")  # buffers that old checkpoints store
OTHER_CONFIG = "give the config.json that came with these weights"


def check_tensors(config: Any, directory: Path, tensors: dict[str, StoredTensor]) -> list[str]:
    """Compare the files' headers with the model that `config` describes.

    Args:
        config: from transformers. tensors: by the names that the architecture gives them.

    Returns:
        Lines that the user should see: what is taken from elsewhere, or not read.

    Raises:
        UserError: a tensor is missing, has another shape or holds codes; or the config describes no model.
    """
    check_not_quantised(directory, tensors)
    stored_layers = {name.removeprefix(LAYERS).split(".")[0] for name in tensors if name.startswith(LAYERS)}
    if config.num_hidden_layers > len(stored_layers):  # before a skeleton of as many layers is built
        problem = f"{directory}/config.json says {config.num_hidden_layers} layers, the files hold {len(stored_layers)}"
        raise UserError(problem, OTHER_CONFIG)
    needed = parameter_shapes(config, directory)
    notes = []
    if HEAD_WEIGHT not in tensors and EMBEDDING_WEIGHT in tensors:
        del needed[HEAD_WEIGHT]  # the embedding is read in its place
        if not getattr(config, "tie_word_embeddings", False):
            notes.append(
                f"{directory} holds no {HEAD_WEIGHT}, although its config.json says that it is not tied to the embedding: "
                "the embedding is used, as transformers does"
            )
    for name, shape in needed.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(
                f"{directory} holds no {name}, which its config.json asks for", f"{DOWNLOAD_AGAIN}, or {OTHER_CONFIG}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{name} in {tensor.file} is of type {tensor.dtype}, not a floating-point weight", DOWNLOAD_AGAIN
            )
        if tensor.shape != shape:
            problem = f"{name} in {directory / tensor.file} is {_by(tensor.shape)}, its config.json says {_by(shape)}"
            raise UserError(problem, OTHER_CONFIG)
    unread = [
        name for name in tensors if name not in needed and name != HEAD_WEIGHT and not name.endswith(NOT_PARAMETERS)
    ]
    if unread:
        others = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        notes.append(
            f"{directory} holds tensors that its config.json has no place for, and that are not read: {unread[0]}{others}"
        )
    return notes


def parameter_shapes(config: Any, directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the model that `config` describes, untied, by name.

    Raises:
        UserError: transformers cannot build it.
    """
    try:
        return {name: tuple(p.shape) for name, p in skeleton(config).named_parameters()}
    except Exception as error:
        problem = f"{directory}/config.json describes no model that transformers can build ({first_line(error)})"
        raise UserError(problem, OTHER_CONFIG) from error


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
