"""What a checkpoint's own format cannot say: `dist_spin.json`, and `dist_spin/online.safetensors` with the online Hadamards
and the learned clips.

The JSON is for people and for `dist_spin.load`; it carries a checksum over itself and those tensors, and a fingerprint of
the weights, so that files of two exports are not mixed unnoticed.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.model.checkpoint_headers import files_fingerprint, weight_map
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.storage.atomic import write_json
from dist_spin.storage.tensor_file import CorruptFile, load_tensors, save_tensors, tensors_digest

NAME, ONLINE = "dist_spin.json", "dist_spin/online.safetensors"
SPECS, HADAMARDS, CLIP_FIELD = ("a", "o", "k", "v"), ("r3", "r4"), "clips"  # fields of Sites
APART_FIELD = "k_bias_apart"  # of Sites, too; in the file where it is true
EXPORT_AGAIN = "copy the whole directory again, or export again"


@dataclass(frozen=True)
class Sidecar:
    """format: hf or compressed-tensors. model_type: the original family. dtype: of compute, a torch name. fingerprint: a hash
    of everything that decided the export. sites: quantisers, clips and online Hadamards the weights were made for."""

    format: str
    profile: str
    model_type: str
    dtype: str
    fingerprint: str
    sites: Sites


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Put it beside the finished weights of `directory`."""
    tensors = _tensors(sidecar.sites)
    if tensors:
        save_tensors(directory / ONLINE, tensors, {"name": ONLINE})
    plain = {field.name: getattr(sidecar, field.name) for field in dataclasses.fields(sidecar) if field.name != "sites"}
    content = {
        **plain,
        "sites": {name: dataclasses.asdict(getattr(sidecar.sites, name)) for name in SPECS},
        "online": {name: [len(f) for f in getattr(sidecar.sites, name)] for name in HADAMARDS},
        "clips": CLIP_FIELD in tensors,
        **({APART_FIELD: True} if sidecar.sites.k_bias_apart else {}),
        "weights": files_fingerprint(directory, weight_map(directory).values()),
    }
    write_description(directory, {**content, "checksum": _checksum(content, tensors)})


def read_sidecar(directory: Path) -> Sidecar:
    """The sidecar of an export whose files belong together.

    Raises:
        UserError: the directory is no export, or one of its files is missing, damaged or of another export.
    """
    try:
        content = json.loads((directory / NAME).read_text())
        checksum, online, clips = content.pop("checksum"), content["online"], content["clips"]
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no {NAME}", "give a directory that `dist-spin export` wrote") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{directory / NAME} cannot be read", EXPORT_AGAIN) from error
    try:
        tensors = load_tensors(directory / ONLINE)[0] if any(online.values()) or clips else {}
    except CorruptFile as error:
        raise UserError(str(error), EXPORT_AGAIN) from error
    if checksum != _checksum(content, tensors):
        raise UserError(f"{directory / NAME}: checksum does not match", EXPORT_AGAIN)
    if content["weights"] != files_fingerprint(directory, weight_map(directory).values()):
        raise UserError(f"the weights in {directory} are not those that {NAME} was written for", EXPORT_AGAIN)
    fields: dict[str, Any] = {name: QuantSpec(**content["sites"][name]) for name in SPECS}
    fields |= {name: tuple(tensors[f"{name}.{i}"] for i in range(len(online[name]))) for name in HADAMARDS}
    fields |= {CLIP_FIELD: tensors[CLIP_FIELD]} if clips else {}
    fields |= {APART_FIELD: content.pop(APART_FIELD, False)}
    plain = {key: value for key, value in content.items() if key not in ("sites", "online", "clips", "weights")}
    return Sidecar(**_renamed(plain), sites=Sites(**fields))


def write_description(directory: Path, content: dict[str, Any]) -> None:
    """dist_spin.json with `content`, which has `format`, `profile` and `fingerprint`."""
    write_json(directory / NAME, content)


def read_description(directory: Path) -> dict[str, Any]:
    """What dist_spin.json says, unchecked.

    Raises:
        OSError, ValueError: it is not there, or no JSON object.
    """
    content = json.loads((directory / NAME).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{directory / NAME} is no JSON object")
    return _renamed(content)


def _renamed(content: dict[str, Any]) -> dict[str, Any]:
    """The same with `fingerprint` under its name of today; exports before version 0.2 called it made_under."""
    return {"fingerprint" if key == "made_under" else key: value for key, value in content.items()}


def _tensors(sites: Sites) -> dict[str, Tensor]:
    factors = {f"{name}.{i}": factor for name in HADAMARDS for i, factor in enumerate(getattr(sites, name))}
    return factors if sites.clips is None else factors | {CLIP_FIELD: sites.clips}


def _checksum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(f"{json.dumps(content, sort_keys=True)} {tensors_digest(tensors)}".encode()).hexdigest()
