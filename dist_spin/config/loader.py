"""Reading the settings of a run: defaults < YAML file < `key.sub=value` on the command line.

A value is read the same way from both places, by the type of its setting, so `1e-4` is a number for `optimize.lr`, `off`
is a word for `optimize.compile` and `12` is text for `name`. Unknown keys fail.
"""

import dataclasses
import difflib
import functools
import logging
import re
import types
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from dist_spin.config.presets import resolve_presets
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError

RENAMED = {"quantize.sweeps": "quantize.cd_passes"}  # old names of settings, which still load


def load_config(path: str | None, overrides: Sequence[str]) -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides`.

    Args:
        path: YAML file of (nested or dotted) settings, or None.
        overrides: `key.sub=value`, `--key.sub=value` or the pair `--key.sub`, `value`; the last of a key wins.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, wrong type, value out of range, or no `model.path`.
    """
    kinds = _kinds()
    from_file = {} if path is None else _collect(_flatten(_read_yaml(path)), path, kinds)
    from_command_line = _collect(_read_overrides(overrides), "the command line", kinds)
    given = from_file | from_command_line
    if "model.path" not in given:
        raise UserError("model.path is not set", "add model.path=MODEL (a directory, hub id, .gguf or package:NAME)")
    for key, value in given.items():
        if type(None) in typing.get_args(kinds[key]) and str(value).lower() in ("", "~", "null", "none"):
            given[key] = None
    parser = _parser()
    try:
        settings = parser.parse_object(given)  # nests the dotted keys; turns each text into its setting's type
    except ArgumentError as error:
        found = re.search(r'Parser key "([\w.]+)"', str(error))
        if found is None or found[1] not in given:
            raise UserError(" ".join(str(error).split()), "see --help for the settings") from error
        key = found[1]
        where = "the command line" if key in from_command_line else path
        raise UserError(f"{key} is {given[key]!r} in {where}", f"it takes {_describe(kinds[key])}") from error
    return resolve_presets(RunConfig(**vars(parser.instantiate(settings))))


def dump_config(config: RunConfig) -> str:
    """YAML of every setting, in the order of the dataclasses; `load_config` reads back an equal RunConfig."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)


def config_help(groups: Collection[str] | None = None) -> str:
    """Settings as `key=TYPE` with their meanings and defaults, by group: for the end of `dist-spin VERB --help`.

    Args:
        groups: names of the groups to list, such as {"model", "quant"}; None lists all. `name` and `output_dir`, which are
            in no group, are always listed.

    Raises:
        ValueError: there is no group of that name.
    """
    if unknown := set(groups or ()) - {item.name for item in dataclasses.fields(RunConfig)}:
        raise ValueError(f"no group of settings is called {', '.join(sorted(unknown))}")
    text = re.sub(r", --\S+\+ \[ITEM,\.\.\.\]", "", _parser().format_help())  # one way to set a list is enough
    text = re.sub(r"type:\s+Literal\[[^\]]*\],\s+", "", text)  # the choices already stand beside the name
    text = re.sub(r"^  --(\S+) ", r"  \1=", text, flags=re.MULTILINE).strip()
    sections = text.split("\n\n")  # a heading such as `quant (…):`, or `The run:`, and its settings
    return "\n\n".join(s for s in sections if groups is None or s.partition(" ")[0] in ("The", *groups)) + "\n"


def _kinds() -> dict[str, Any]:
    """Dotted name of every setting -> its type, in the order of the dataclasses."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{leaf}": hint for leaf, hint in typing.get_type_hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


@functools.cache
def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(usage=SUPPRESS, add_help=False, exit_on_error=False)
    parser.add_class_arguments(RunConfig, None)
    kinds = _kinds()
    for action in parser._actions:
        if action.dest not in kinds:
            action.help = SUPPRESS  # `--GROUP FILE`: we take one file for all groups
    return parser


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars all stay text (no YAML 1.1 surprises such as off = False) and whose keys occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(problem="a key is set twice", problem_mark=node.start_mark)
        return mapping


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_TextLoader)  # text only: safe
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}", "give the path of a YAML file; configs/ has some") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = " ".join(str(problem).split())
        raise UserError(f"{where}: {problem}", "write `key: value`, indented by spaces") from error
    if not isinstance(content or {}, dict):
        raise UserError(f"{path} holds no settings", "write `key: value` lines; configs/ has examples")
    return content or {}


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
            raise UserError(f"{word!r} on the command line sets nothing", "write key=value, such as optimize.steps=20")
        yield key, following


def _collect(pairs: Iterator[tuple[str, Any]], where: str | None, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings by name; the last of a name wins, an unknown name is an error."""
    flat: dict[str, Any] = {}
    for written, value in pairs:
        key = RENAMED.get(written, written)
        if key != written:
            logging.getLogger(__name__).warning("%s is now called %s (in %s)", written, key, where)
        members = [name for name in kinds if name.startswith(f"{key}.")]
        if key in kinds:
            flat[key] = value
        elif members and value:  # without a value it is a group whose lines are all commented out
            raise UserError(f"{key} is {value!r} in {where}, but it is a group", f"set {members[0]} or another of it")
        elif not members:
            leaf = key.rpartition(".")[2]
            same_leaf = [name for name in kinds if name.rpartition(".")[2] == leaf]
            close = same_leaf or difflib.get_close_matches(key, kinds, n=1)
            remedy = f"did you mean {' or '.join(close)}?" if close else "see --help for the settings"
            raise UserError(f"unknown setting {key!r} in {where}", remedy)
    return flat


def _describe(kind: Any) -> str:
    """What a setting of this type takes, in words."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(args)
    if typing.get_origin(kind) is list:
        return f"a list such as [a, b], each {_describe(args[0])}"
    if typing.get_origin(kind) is types.UnionType:
        return f"{_describe(args[0])} or null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
