"""YAML read as plain text: nested dictionaries and lists of strings, bounded in size, depth and expansion.

The loader of a run's settings types the strings itself. Files may come from anyone, so nothing in them builds objects, and
none of them takes longer to refuse than a second or so.
"""

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dist_spin.config.checks import one_line
from dist_spin.errors import UserError

MAX_BYTES = 2**17  # a file of all settings has 2**13
MAX_DEPTH = 16  # settings need 3: group, setting, list
YAML_ENDINGS = (".yaml", ".yml")
EXAMPLES = "give the path of a YAML file; `dist-spin init` writes one"


def read_yaml(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file; empty where the file holds nothing.

    Raises:
        UserError: the file cannot be read, is no regular file, is larger than MAX_BYTES or no UTF-8; it is no YAML as
            `parse_yaml` wants it; or it holds something else than a mapping.
    """
    printed = one_line(path)
    try:
        text = _read_bounded(Path(path)).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {printed}: {error.strerror}", EXAMPLES) from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {printed}: it is not UTF-8 text", EXAMPLES) from error
    except ValueError as error:
        raise UserError(f"cannot read {printed}: {error}", EXAMPLES) from error
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f"{printed}, line {mark.line + 1}" if mark else printed
        raise UserError(
            f"{where}: {' '.join(str(problem).split())}", "write `key: value`, indented by spaces"
        ) from error
    if not isinstance(content or {}, dict):
        raise UserError(f"{printed} holds no settings", "write `key: value` lines; `dist-spin init` writes an example")
    return content or {}


def quoted(text: str) -> str:
    """`text` as a value in YAML: as it is where that reads back as itself, else in quotes."""
    try:
        plain = parse_yaml(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def parse_yaml(text: str) -> Any:
    """The content of one YAML document as dictionaries, lists and strings (no YAML 1.1 surprises such as off = False).

    Raises:
        yaml.YAMLError: syntax, a key that is set twice, nesting deeper than MAX_DEPTH, an alias of a mapping or list, or
            aliases that make the text longer than MAX_BYTES characters.
    """
    loader = _TextLoader(text)  # its scalars all stay text, and no tag builds an object: safe
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:  # PyYAML hands "\UFFFFFFFF" and endless version numbers to Python
        problem = "a character or number that is too large"
        raise yaml.scanner.ScannerError(problem=problem, problem_mark=loader.get_mark()) from error
    finally:
        loader.dispose()


def _read_bounded(path: Path) -> bytes:
    """The bytes of a regular file: a device may never end, and what a pipe gives the first process no other one reads."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is no regular file, which every process of a run could read")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB")
    return content


class _TextLoader(yaml.BaseLoader):
    """See `parse_yaml`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.alias_characters = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):  # few bytes may stand for many: aliases of aliases of lists
            if not isinstance(node, yaml.ScalarNode):
                self.refuse(event, f"the alias *{event.anchor} stands for a mapping or list, so write that out")
            self.alias_characters += len(node.value)
            if self.alias_characters > MAX_BYTES:
                self.refuse(event, f"aliases stand for more than {MAX_BYTES} characters")
        return node

    def refuse(self, event: yaml.Event, problem: str) -> NoReturn:
        mark: Any = event.start_mark  # the stubs of PyYAML allow libyaml's marks only here, not in the error
        raise yaml.composer.ComposerError(problem=problem, problem_mark=mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(problem="a key is set twice", problem_mark=node.start_mark)
        return mapping
