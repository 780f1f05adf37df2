"""The parser of the command line: argparse whose mistakes are one line, and whose help ends with the settings."""

import argparse
from argparse import SUPPRESS
from typing import Any, NoReturn

from dist_spin.config.help import config_help, settings_index
from dist_spin.errors import EXIT_OK, UserError

EVERYWHERE = {
    "quiet": "show nothing but warnings and results",
    "verbose": "show every rank's lines, with time, rank and level, and what libraries say",
}
EXPLAIN = "`dist-spin help optimize.lr` explains a setting, `dist-spin help optimize.` a group of them, --help-all all of them."


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, and whose help ends with the settings that are read."""

    def __init__(self, *, reads: tuple[str, ...] = (), **options: Any) -> None:
        """reads: settings, as `settings_index` takes them."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.reads = reads
        self.verbs: dict[str, Parser] = {}  # of the whole program's: the parser of each verb

    def format_help(self) -> str:
        """As argparse's, then the names of the settings."""
        return super().format_help() + (f"\n{settings_index(self.reads)}\n{EXPLAIN}\n" if self.reads else "")

    def option_names(self) -> list[str]:
        """Its options without the dashes in front."""
        return [name.lstrip("-") for action in self._actions for name in action.option_strings if name[:2] == "--"]

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which swallows the error of a reader who has left."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        verb = self.prog.removeprefix("dist-spin ")
        if message.endswith("required: RUN"):
            message = "no RUN is given, the directory of a run, such as runs/NAME"
        raise UserError(f"{verb}: {message}", f"`{self.prog} --help` says what it takes", shared=True)


class HelpAll(argparse.Action):
    """Prints help with every setting."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{argparse.ArgumentParser.format_help(parser)}\n{config_help()}", end="")
        raise SystemExit(EXIT_OK)


def every_verb() -> argparse.ArgumentParser:
    """The options of every verb."""
    parser = argparse.ArgumentParser(add_help=False)
    for name, meaning in EVERYWHERE.items():
        parser.add_argument(f"--{name}", action="store_true", default=SUPPRESS, help=meaning)
    return parser
