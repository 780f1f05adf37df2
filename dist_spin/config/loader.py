"""Reading the settings of a run: defaults < YAML file < `key.sub=value` on the command line. Unknown keys fail."""

import dataclasses
import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from dist_spin.config.checks import one_line, shown
from dist_spin.config.model import ModelConfig
from dist_spin.config.presets import resolve_presets
from dist_spin.config.run import RunConfig
from dist_spin.config.suggestions import closest_settings, did_you_mean
from dist_spin.config.values import describe_type, parse_value, suggest_value
from dist_spin.config.yaml_text import read_yaml
from dist_spin.errors import Mistakes, UserError

MODEL_REMEDY = (
    "add model.path=MODEL (a directory, hub id, .gguf or package:NAME); `dist-spin init` writes a configuration"
)
STANDS = "stands where a setting should"
MOST_MISTAKES = 10  # that are told at once
RENAMED = {"quantize.sweeps": "quantize.cd_passes"}  # old names of settings, which still load


def load_config(path: str | None, overrides: Sequence[str], where: str = "the command line") -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides`; presets are resolved.

    Args:
        path: YAML file of (nested or dotted) settings, or None.
        overrides: `key.sub=value`, `--key.sub=value` or the pair `--key.sub`, `value`; the last of a key wins.
        where: where the overrides come from, for messages.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, wrong type, value out of range, or no `model.path`. Several mistakes
            are told together (`Mistakes`).
    """
    kinds, mistakes = _kinds(), Found()
    file = "" if path is None else one_line(path)
    from_file = {} if path is None else _collect(_flatten(read_yaml(path)), file, kinds, mistakes)
    from_overrides = _collect(_read_overrides(overrides, mistakes), where, kinds, mistakes)
    given = from_file | from_overrides
    if "model.path" not in given and not mistakes.of_model:
        mistakes.add("model.path is not set", MODEL_REMEDY)
    values: dict[str, Any] = {}
    for key, value in given.items():
        try:
            values[key] = parse_value(kinds[key], value)
        except ValueError:
            place = where if key in from_overrides else file
            hint = did_you_mean(suggest_value(kinds[key], value))
            mistakes.add(f"{key} is {shown(value)} in {place}", f"{hint}it takes {describe_type(kinds[key])}")
    config = _build(values, mistakes)
    mistakes.raise_any()
    assert config is not None
    return resolve_presets(config)


class Found:
    """The mistakes of a configuration so far."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def add(self, problem: str, remedy: str) -> None:
        """Note one."""
        self.errors.append(UserError(problem, remedy))

    @property
    def of_model(self) -> bool:
        """Whether one of them may be why the model is not known: its setting is misspelt, or the file was not read."""
        return any("model.path" in str(error) or STANDS in str(error) for error in self.errors)

    def raise_any(self) -> None:
        """Raise what was found: the mistake, or all of them as one error."""
        if len(self.errors) > MOST_MISTAKES:
            left = len(self.errors) - MOST_MISTAKES
            self.errors[MOST_MISTAKES:] = [UserError(f"{left} more mistakes", "put these right first")]
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else Mistakes(self.errors)


def _build(values: dict[str, Any], mistakes: Found) -> RunConfig | None:
    """The configuration of typed values by dotted name; None where a mistake is in the way."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    own, hints = groups.pop("", {}), typing.get_type_hints(RunConfig)
    built: dict[str, Any] = {}
    for group, settings in groups.items():
        built[group] = _checked(hints[group], settings, f"{group}.", mistakes)
    if built.get("model") is None:
        built["model"] = ModelConfig("unknown")  # the mistake is noted; those of other settings are found all the same
    return _checked(RunConfig, own, "", mistakes, **{group: part for group, part in built.items() if part is not None})


def _checked(kind: Any, settings: dict[str, Any], prefix: str, mistakes: Found, **others: Any) -> Any:
    """`kind` built of its settings. A setting that is refused is noted and left out, and the others are checked again.

    None where that leaves nothing to build.
    """
    left = dict(settings)
    while True:
        try:
            return kind(**left, **others)
        except TypeError:  # a setting without a default is missing, which is noted already
            if mistakes.errors:
                return None
            raise
        except UserError as error:
            mistakes.errors.append(error)
            refused = error.problem.partition(" is ")[0].removeprefix(prefix)
            if refused not in left:
                return None
            del left[refused]


def dump_config(config: RunConfig) -> str:
    """YAML of every setting, in the order of the dataclasses; `load_config` reads back an equal RunConfig."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)


def setting_names() -> list[str]:
    """The dotted names of all settings, in the order of the dataclasses."""
    return list(_kinds())


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


def _read_overrides(overrides: Sequence[str], mistakes: Found) -> Iterator[tuple[str, str]]:
    words = list(overrides)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key:
            yield key, value
        elif word.startswith("--") and key and words:
            yield key, words.pop(0)
        elif word.endswith((".yaml", ".yml")):
            mistakes.add(f"{shown(word)} {STANDS}", "give one CONFIG.yaml, before all settings")
        else:
            remedy = "write key=value, such as optimize.steps=20"
            if words and "=" not in word and (words[0][:1] == "=" or "=" not in words[0]):  # `key value`, `key = value`
                following = words.pop(0)
                value = words.pop(0) if following == "=" and words else following.removeprefix("=")
                remedy = f"write key=value without spaces: {one_line(f'{key}={value}')}"
            mistakes.add(f"{shown(word)} on the command line sets nothing", remedy)


def _collect(pairs: Iterator[tuple[str, Any]], where: str, kinds: Mapping[str, Any], mistakes: Found) -> dict[str, Any]:
    """Dotted settings by name; the last of a name wins, an unknown name is a mistake."""
    flat: dict[str, Any] = {}
    names: dict[str, str] = {}  # setting -> the name it is written by here
    for written, value in pairs:
        key = RENAMED.get(written, written)
        if names.setdefault(key, written) != written:
            old = next(old for old, new in RENAMED.items() if new == key)
            mistakes.add(f"{old} and {key} are both set in {where}, but are one setting", f"keep {key} alone")
        if key != written:
            logging.getLogger(__name__).warning("%s is now called %s (in %s)", written, key, where)
        members = [name for name in kinds if name.startswith(f"{key}.")]
        if key in kinds:
            flat[key] = value
        elif members and value:  # without a value it is a group whose lines are all commented out
            mistakes.add(f"{key} is {shown(value)} in {where}, but it is a group", f"set {members[0]} or another of it")
        elif not members:
            names_meant = closest_settings(key, list(kinds)) if len(mistakes.errors) < MOST_MISTAKES else []
            remedy = did_you_mean(names_meant).strip() or "see --help for the settings"
            mistakes.add(f"unknown setting {shown(key)} in {where}", remedy)
    return flat
