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

from dist_spin.config.checks import shown
from dist_spin.config.run import RunConfig
from dist_spin.config.suggestions import closest_settings, did_you_mean
from dist_spin.errors import UserError

INDEX_WIDTH = 110  # columns


def settings_index(reads: Collection[str]) -> str:
    """The names of settings, a paragraph for each group, for the end of `dist-spin VERB --help`.

    reads: groups, such as "quant", and single settings of others, such as "optimize.steps".
    """
    lines = []
    for name, kind in setting_groups().items():
        names = [item.name for item in dataclasses.fields(kind) if {name, f"{name}.{item.name}"} & set(reads)]
        if names:
            start = f"  {name}."
            lines += textwrap.wrap(
                " ".join(names), INDEX_WIDTH, initial_indent=f"{start:15}", subsequent_indent=" " * 15
            )
    return (
        "\n".join(["settings, each as key=value here or in CONFIG.yaml:", "  name output_dir base_dir", *lines]) + "\n"
    )


def settings_help(prefix: str) -> str:
    """The settings whose dotted names begin with `prefix`, such as "optimize.lr" or "quant.", as `config_help` has them.

    Raises:
        UserError: there is none.
    """
    names = [f"{group}.{item.name}" for group, kind in setting_groups().items() for item in dataclasses.fields(kind)]
    names += [item.name for item in dataclasses.fields(RunConfig) if item.name not in setting_groups()]
    if not any(name.startswith(prefix) for name in names):
        meant = did_you_mean(closest_settings(prefix, names))
        raise UserError(
            f"no setting begins with {shown(prefix)}", f"{meant}`dist-spin --help-all` lists them", shared=True
        )
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    _add_section(parser, RunConfig, "", prefix)
    for group, kind in setting_groups().items():
        _add_section(parser, kind, f"{group}.", prefix)
    return parser.format_help().strip() + "\n"


def setting_groups() -> dict[str, Any]:
    """The dataclass of every group of settings, by name."""
    return {name: kind for name, kind in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)}


def config_help(groups: Collection[str] | None = None) -> str:
    """Settings as `key=TYPE` with their meanings and defaults, by group: for `--help-all`.

    Args:
        groups: names of the groups to list, such as {"model", "quant"}; None lists all. Those that are in no group, such as
            `name`, are always listed.

    Raises:
        ValueError: there is no group of that name.
    """
    kinds = setting_groups()
    if unknown := set(groups or ()) - set(typing.get_type_hints(RunConfig)):
        raise ValueError(f"no group of settings is called {', '.join(sorted(unknown))}")
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)  # it lays out the text; it parses nothing
    _add_section(parser, RunConfig, "")
    for name, kind in kinds.items():
        if groups is None or name in groups:
            _add_section(parser, kind, f"{name}.")
    return parser.format_help().strip() + "\n"


def _add_section(parser: argparse.ArgumentParser, kind: Any, prefix: str, only: str = "") -> None:
    """Add the settings of one dataclass, which are called `prefix` and the field's name; those whose names begin with `only`."""
    title, docs, hints = inspect.getdoc(kind) or "", field_docs(kind), typing.get_type_hints(kind)
    section = parser.add_argument_group(title.partition("\n")[0].rstrip("."))
    for item in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[item.name]) and f"{prefix}{item.name}".startswith(only):
            words = f"{docs[item.name]} ({_type_and_default(item, hints[item.name])})"
            metavar = f"{prefix}{item.name}={_placeholder(item.name, hints[item.name])}"
            section.add_argument(f"{prefix}{item.name}", metavar=metavar, help=words.replace("%", "%%"))


def field_docs(kind: type) -> dict[str, str]:
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
    named = [] if typing.get_origin(kind) is Literal else [f"type: {type_name(kind)}"]
    if item.default is item.default_factory:  # both MISSING
        return ", ".join(["required", *named])
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return ", ".join([*named, f"default: {'null' if default is None else default}"])


def type_name(kind: Any) -> str:
    """A type hint as a setting's help has it: `int`, `list[str]`, `int | null`."""
    if isinstance(kind, types.UnionType):
        return " | ".join("null" if arg is types.NoneType else type_name(arg) for arg in typing.get_args(kind))
    return str(kind).replace("typing.", "") if typing.get_args(kind) else kind.__name__
