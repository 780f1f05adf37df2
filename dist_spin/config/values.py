"""Reading the text of one setting by the type of its field, alike from YAML and from the command line.

So `1e-4` is a number for `optimize.lr`, `off` is a word for `optimize.compile` and `12` is text for `name`.
"""

import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import yaml

from dist_spin.config.suggestions import closest
from dist_spin.config.yaml_text import parse_yaml

NULLS = ("", "~", "null", "none")
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WHOLE_NUMBER = r"[+-]?[0-9]+(_[0-9]+)*"
NUMBER = rf"({WHOLE_NUMBER}\.?|[+-]?[0-9]*\.[0-9]+)([eE][+-]?[0-9]+)?"


def parse_value(kind: Any, value: Any) -> Any:
    """The value of a setting.

    Args:
        kind: type of its field: int, float, bool, str, a Literal of texts, `X | None`, or a list of one of these.
        value: text, or a list of texts where YAML had a list.

    Raises:
        ValueError: `value` is nothing of that type.
    """
    args = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return [parse_value(args[0], item) for item in _parse_list(value)]
    if not isinstance(value, str):
        raise ValueError("a single value is wanted")
    if typing.get_origin(kind) is types.UnionType:
        return None if value.lower() in NULLS else parse_value(args[0], value)
    if typing.get_origin(kind) is Literal:
        if value not in args:
            raise ValueError("none of the choices")
        return value
    parsers: dict[Any, Callable[[str], Any]] = {int: _parse_int, float: _parse_float, bool: _parse_bool, str: str}
    return parsers[kind](value)


def suggest_value(kind: Any, value: Any) -> list[str]:
    """The choices that a refused value resembles, such as gptq for GPTQ; [] where the setting has none."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return [choice for item in _parse_list_or_none(value) for choice in suggest_value(args[0], item)]
    if typing.get_origin(kind) is not Literal or not isinstance(value, str) or value in args:
        return []
    return closest(value, args)


def describe_type(kind: Any) -> str:
    """What a setting of this type takes, in words."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(args)
    if typing.get_origin(kind) is list:
        return f"a list such as [a, b], each {describe_type(args[0])}"
    if typing.get_origin(kind) is types.UnionType:
        return f"{describe_type(args[0])} or null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _parse_list(value: Any) -> list[Any]:
    """The items of a list; a single word is a list of one, and `a,b` a list of two, unless it names paths (text:a,b)."""
    if isinstance(value, str):
        text = value
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError("no list") from error
        if isinstance(value, str) and value.strip():
            value = [text] if ":" in text else [item.strip() for item in text.split(",")]
    if not isinstance(value, list):
        raise ValueError("no list")
    return value


def _parse_list_or_none(value: Any) -> list[Any]:
    try:
        return _parse_list(value)
    except ValueError:
        return []


def _parse_int(text: str) -> int:
    if not re.fullmatch(WHOLE_NUMBER, text.strip()):
        raise ValueError("no whole number")
    return int(text)  # ValueError where it has thousands of digits


def _parse_float(text: str) -> float:
    if not re.fullmatch(NUMBER, text.strip()):
        raise ValueError("no number")
    return float(text)


def _parse_bool(text: str) -> bool:
    if text.strip().lower() not in BOOLS:
        raise ValueError("neither true nor false")
    return BOOLS[text.strip().lower()]
