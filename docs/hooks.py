"""What `mkdocs build` adds to the pages of this folder: settings from the code, and pages and sources that lie elsewhere.

README.md is the first page. Links are written as they hold in the repository; here those that lead out of `docs/` come to lead to
copies of the Markdown pages outside, and to pages that show a source file.
"""

import dataclasses
import inspect
import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dist_spin.config.help import field_docs, setting_groups, type_name
from dist_spin.config.run import RunConfig

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # Markdown pages that lie elsewhere -> their names on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "slurm/README.md": "slurm-scripts.md",
}
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".toml": "toml", ".cff": "yaml"}
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")
SETTINGS = "<!-- settings -->"
HOOKS = "docs/hooks.py"  # this file, the only one in the folder that is no part of the site


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and one for each source file that any page links to."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=_relinked(path, name)))
    pages = [*OUTSIDE, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if file.abs_src_path)]
    for path in sorted({target for page in pages for target in _sources(page)}):
        files.append(File.generated(config, _source_page(path), content=_listing(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to what the site has; fill in the settings."""
    if page.file.abs_src_path:
        markdown = _relinked(f"docs/{page.file.src_uri}", page.file.src_uri)
    # A forge's tables want a backslash before a bar inside code, and do not show it; here it would be shown.
    rows = re.compile(r"^\|.*$", re.MULTILINE)
    markdown = rows.sub(lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), row[0]), markdown)
    return markdown.replace(SETTINGS, settings_list())


def settings_list() -> str:
    """Every setting as Markdown, from the dataclasses of `dist_spin.config`: a heading and definitions for each group."""
    groups = [_group("The run", RunConfig, "")]
    groups += [_group(f"`{name}`", kind, f"{name}.") for name, kind in setting_groups().items()]
    return "\n\n".join(groups)


def _group(title: str, kind: Any, prefix: str) -> str:
    docs, hints = field_docs(kind), inspect.get_annotations(kind)
    about = (inspect.getdoc(kind) or "").partition("\n")[0].partition(" (")[2].rstrip(".)")
    lines = [f"## {title}", "", *([f"{about[0].upper()}{about[1:]}.", ""] if about else [])]
    for item in dataclasses.fields(kind):
        if prefix or item.name not in setting_groups():
            lines += [f"**`{prefix}{item.name}`** {_type_and_default(item, hints[item.name])}", ""]
            lines += [f":   {docs[item.name]}", ""]
    return "\n".join(lines)


def _type_and_default(item: "dataclasses.Field[Any]", kind: Any) -> str:
    """Such as int, default `4`; choices in place of a type."""
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    choices = kind.__args__ if get_origin(kind) is Literal else ()
    named = " · ".join(f"`{choice}`" for choice in choices) or type_name(kind)
    shown = {"None": "null", "True": "true", "False": "false", "": '""'}.get(str(default), default)
    return f"{named}, {'required' if default is dataclasses.MISSING else f'default `{shown}`'}"


def _relinked(path: str, name: str) -> str:
    """The text of a page of the repository with its links as they hold for the page `name` of the site."""
    start = os.path.dirname(name)

    def led(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if not target or re.match(r"\w+:", target):
            return match[0]
        goal = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if goal == "docs":
            here = "index.md"
        elif goal.startswith("docs/") and goal != HOOKS:
            here = goal.removeprefix("docs/")
        else:
            here = OUTSIDE.get(goal) or _source_page(goal)
        return f"]({os.path.relpath(here, start or '.')}{anchor})"

    return LINK.sub(led, (ROOT / path).read_text(encoding="utf-8"))


def _sources(page: str) -> Iterator[str]:
    """The source files, as paths in the repository, that a page links to."""
    for target, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        goal = os.path.normpath(os.path.join(os.path.dirname(page), target))
        if (
            target
            and not re.match(r"\w+:", target)
            and goal not in OUTSIDE
            and (goal == HOOKS or not goal.startswith("docs"))
        ):
            yield goal


def _source_page(path: str) -> str:
    return f"source/{path}.md"


def _listing(path: str) -> str:
    """A page that shows a file, or names what a folder holds."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    place = ROOT / path
    if place.is_dir():
        return head + "\n".join(f"- `{entry.name}`" for entry in sorted(place.iterdir()) if entry.name[0] not in "._")
    fence = "``````"
    return f"{head}{fence}{LANGUAGES.get(place.suffix, 'text')}\n{place.read_text(encoding='utf-8')}\n{fence}\n"
