"""The help of the settings, from the docstrings of the dataclasses' fields."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Collection
from typing import Any, Literal

from dist_spin.config.run import RunConfig


def config_help(groups: Collection[str] | None = None) -> str:
    """Settings as `key=TYPE` with their meanings and defaults, by group: for the end of `dist-spin VERB --help`.

    Args:
        groups: names of the groups to list, such as {"model", "quant"}; None lists all. `name` and `output_dir`, which are
            in no group, are always listed.

    Raises:
        ValueError: there is no group of that name.
    """
    hints = typing.get_type_hints(RunConfig)
    kinds = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    if unknown := set(groups or ()) - set(hints):
        raise ValueError(f"no group of settings is called {', '.join(sorted(unknown))}")
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)  # it lays out the text; it parses nothing
    _add_section(parser, RunConfig, "")
    for name, kind in kinds.items():
        if groups is None or name in groups:
            _add_section(parser, kind, f"{name}.")
    return parser.format_help().strip() + "\n"


def _add_section(parser: argparse.ArgumentParser, kind: Any, prefix: str) -> None:
    """Add the settings of one dataclass, which are called `prefix` and the field's name."""
    title, docs, hints = inspect.getdoc(kind) or "", _field_docs(kind), typing.get_type_hints(kind)
    section = parser.add_argument_group(title.partition("\n")[0].rstrip("."))
    for item in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[item.name]):
            words = f"{docs[item.name]} ({_type_and_default(item, hints[item.name])})"
            metavar = f"{prefix}{item.name}={_placeholder(item.name, hints[item.name])}"
            section.add_argument(f"{prefix}{item.name}", metavar=metavar, help=words.replace("%", "%%"))


def _field_docs(kind: type) -> dict[str, str]:
    """Field -> the string below it in the source, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs


def _placeholder(name: str, kind: Any) -> str:
    """What stands for the value: the choices, a list of items, or the setting's name in capitals."""
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    if typing.get_origin(kind) is list:
        return "[ITEM,...]"
    return "{true,false}" if kind is bool else name.upper()


def _type_and_default(item: dataclasses.Field[Any], kind: Any) -> str:
    """Such as `type: int, default: 4`; choices stand beside the name."""
    named = [] if typing.get_origin(kind) is Literal else [f"type: {_type_name(kind)}"]
    if item.default is item.default_factory:  # both MISSING
        return ", ".join(["required", *named])
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return ", ".join([*named, f"default: {'null' if default is None else default}"])


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " | ".join("null" if arg is types.NoneType else _type_name(arg) for arg in typing.get_args(kind))
    return str(kind).replace("typing.", "") if typing.get_args(kind) else kind.__name__
