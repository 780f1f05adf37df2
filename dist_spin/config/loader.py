"""Reading the settings of a run: defaults < YAML file < `key.sub=value` on the command line. Unknown keys fail."""

import dataclasses
import difflib
import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from dist_spin.config.checks import one_line, shown
from dist_spin.config.presets import resolve_presets
from dist_spin.config.run import RunConfig
from dist_spin.config.values import describe_type, parse_value
from dist_spin.config.yaml_text import read_yaml
from dist_spin.errors import UserError

RENAMED = {"quantize.sweeps": "quantize.cd_passes"}  # old names of settings, which still load


def load_config(path: str | None, overrides: Sequence[str]) -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides`; presets are resolved.

    Args:
        path: YAML file of (nested or dotted) settings, or None.
        overrides: `key.sub=value`, `--key.sub=value` or the pair `--key.sub`, `value`; the last of a key wins.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, wrong type, value out of range, or no `model.path`.
    """
    kinds = _kinds()
    file = "" if path is None else one_line(path)
    from_file = {} if path is None else _collect(_flatten(read_yaml(path)), file, kinds)
    from_command_line = _collect(_read_overrides(overrides), "the command line", kinds)
    given = from_file | from_command_line
    if "model.path" not in given:
        raise UserError("model.path is not set", "add model.path=MODEL (a directory, hub id, .gguf or package:NAME)")
    groups: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        group, _, name = key.rpartition(".")
        try:
            groups.setdefault(group, {})[name] = parse_value(kinds[key], value)
        except ValueError as error:
            where = "the command line" if key in from_command_line else file
            raise UserError(f"{key} is {shown(value)} in {where}", f"it takes {describe_type(kinds[key])}") from error
    own, hints = groups.pop("", {}), typing.get_type_hints(RunConfig)
    return resolve_presets(RunConfig(**own, **{group: hints[group](**values) for group, values in groups.items()}))


def dump_config(config: RunConfig) -> str:
    """YAML of every setting, in the order of the dataclasses; `load_config` reads back an equal RunConfig."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)


def _kinds() -> dict[str, Any]:
    """Dotted name of every setting -> its type, in the order of the dataclasses."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{leaf}": hint for leaf, hint in typing.get_type_hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        following = next(words, None) if word.startswith("--") and not equals else value
        if following is None or not (equals or word.startswith("--")):
            raise UserError(
                f"{shown(word)} on the command line sets nothing", "write key=value, such as optimize.steps=20"
            )
        yield key, following


def _collect(pairs: Iterator[tuple[str, Any]], where: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings by name; the last of a name wins, an unknown name is an error."""
    flat: dict[str, Any] = {}
    names: dict[str, str] = {}  # setting -> the name it is written by here
    for written, value in pairs:
        key = RENAMED.get(written, written)
        if names.setdefault(key, written) != written:
            old = next(old for old, new in RENAMED.items() if new == key)
            raise UserError(f"{old} and {key} are both set in {where}, but are one setting", f"keep {key} alone")
        if key != written:
            logging.getLogger(__name__).warning("%s is now called %s (in %s)", written, key, where)
        members = [name for name in kinds if name.startswith(f"{key}.")]
        if key in kinds:
            flat[key] = value
        elif members and value:  # without a value it is a group whose lines are all commented out
            raise UserError(
                f"{key} is {shown(value)} in {where}, but it is a group", f"set {members[0]} or another of it"
            )
        elif not members:
            leaf = key.rpartition(".")[2]
            same_leaf = [name for name in kinds if name.rpartition(".")[2] == leaf]
            close = same_leaf or difflib.get_close_matches(key, kinds, n=1)
            remedy = f"did you mean {' or '.join(close)}?" if close else "see --help for the settings"
            raise UserError(f"unknown setting {shown(key)} in {where}", remedy)
    return flat
