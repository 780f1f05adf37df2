"""The house stays in order: no circle of imports, no long file, no import with effects, no page that names what is not there."""

import ast
import dataclasses
import functools
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import circle, contents, floors, imports, rooms

from dist_spin import errors
from dist_spin.cli import main
from dist_spin.config.run import RunConfig

ROOT = Path(__file__).parent.parent
FILES = sorted(path for top in ("dist_spin", "launch") for path in (ROOT / top).rglob("*.py"))
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        ROOT / "slurm" / "README.md",
    ]
)
LONGEST = 400  # lines of a file
modules = functools.cache(imports)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- imports --


def test_the_import_graph_is_the_one_of_this_checkout() -> None:
    found = {module.replace(".", "/").replace("dist_spin/launch", "launch") for module in modules()}
    assert found == {name(path).removesuffix(".py").removesuffix("/__init__") for path in FILES}
    assert "dist_spin.optimize.setup" in modules()["dist_spin.optimize.train"]
    assert "dist_spin.launch.jobs" in modules()["dist_spin.launch.fanout"]


def test_no_file_imports_itself_through_others() -> None:
    # The one late import that reaches up is the public `load`; it closes no circle as long as nobody imports the bare package.
    assert circle(modules()) == []


@pytest.mark.parametrize("folder", ["", *sorted({module.rpartition(".")[0] for module in modules()} - {""})])
def test_no_folder_imports_itself_through_others(folder: str) -> None:
    assert circle(contents(modules(), folder)) == []


def test_a_circle_between_folders_is_seen_where_the_files_have_none() -> None:
    graph = {"p.a.one": {"p.b.one"}, "p.b.one": set(), "p.b.two": {"p.a.two"}, "p.a.two": set(), "p": {"p.a.one"}}
    assert circle(graph) == []
    assert sorted(set(circle(contents(graph, "p")))) == ["p.a", "p.b"]
    assert circle(contents(graph, "p.a")) == []
    assert circle(graph | {"p.b.one": {"p.a.one"}})[0] in ("p.a.one", "p.b.one")


def names_taken(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) for every name that a file imports from dist_spin."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dist_spin":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").rglob("*.py")), ids=name)
def test_a_benchmark_imports_names_that_exist(script: Path) -> None:
    # No other test runs most of these scripts: a name that goes from dist_spin would be missed by their users alone.
    for module, taken in names_taken(script):
        assert hasattr(importlib.import_module(module), taken), f"{module}.{taken}"


# -- files --


def test_no_file_is_longer_than_one_idea() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 100
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


def environment_changes(tree: ast.Module) -> Iterator[int]:
    """Lines where the environment is changed when the module is imported: outside of functions."""

    def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield child
                yield from run_on_import(child)

    changing = {"setdefault", "update", "pop", "popitem", "clear", "__setitem__", "__delitem__"}
    for node in run_on_import(tree):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) in ("os.environ", "environ"):
                yield node.lineno
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) in ("os.environ", "environ"):
            yield node.lineno
        elif isinstance(node, ast.Call):
            function, _, method = ast.unparse(node.func).rpartition(".")
            if (function in ("os.environ", "environ") and method in changing) or method in ("putenv", "unsetenv"):
                yield node.lineno


def test_importing_a_file_changes_no_environment_variable() -> None:
    changes = {
        f"{name(p)}:{line}" for p in FILES for line in environment_changes(ast.parse(p.read_text(encoding="utf-8")))
    }
    assert changes == set()


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("import os\nos.environ['A'] = '1'", 1),
        ("import os\nif True:\n    os.environ.setdefault('A', '1')", 1),
        ("import os\ndel os.environ['A']", 1),
        ("import os\nos.environ |= {}", 1),
        ("from os import environ\nclass A:\n    environ['A'] = '1'", 1),
        ("import os\nos.putenv('A', '1')", 1),
        ("import os\nA = os.environ.get('A') or os.environ['B']\ndef f():\n    os.environ['A'] = '1'", 0),
    ],
)
def test_a_change_of_the_environment_is_seen(source: str, changes: int) -> None:
    assert len(list(environment_changes(ast.parse(source)))) == changes


# -- pages --


def blocks(page: Path) -> Iterator[list[str]]:
    """The indented blocks of a page, each as its lines without the indent."""
    block: list[str] = []
    for line in [*page.read_text(encoding="utf-8").splitlines(), "end"]:
        if line.startswith("    ") or (not line and block):
            block.append(line[4:])
        elif block:
            yield block
            block = []


def tree_names(block: list[str]) -> Iterator[str]:
    """Paths of a drawn tree, folders two spaces above what is in them, and what a description names, as `methods/` or `x.py`."""
    parents: list[tuple[int, str]] = []
    for line in filter(None, block):
        indent, (first, *words) = len(line) - len(line.lstrip()), line.split()
        if not re.fullmatch(r"[\w.-]+(/|\.\w+)", first):
            continue  # a description goes on
        parents = [parent for parent in parents if parent[0] < indent]
        path = (parents[-1][1] if parents else "") + first
        yield path
        for word in words:
            if inner := re.fullmatch(r"([\w-]+(?:/|\.py))[:;,]?", word):
                yield path + inner[1]
        if first.endswith("/"):
            parents.append((indent, path))


def test_every_name_of_the_readmes_tree_is_there_and_every_room_is_in_it() -> None:
    (tree,) = [block for block in blocks(ROOT / "README.md") if block[0] == "dist_spin/"]
    paths = list(tree_names(tree))
    assert {"dist_spin/", "dist_spin/cli.py", "dist_spin/optimize/", "dist_spin/optimize/sharding/"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = {Path(path).stem for path in paths if path.count("/") + (not path.endswith("/")) == 2 or path == "launch/"}
    assert set(rooms(modules())) - names == {"dist_spin", "__main__", "version"}


def test_the_floors_drawn_are_those_that_the_linter_holds() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in linter["contracts"] if contract["id"] == "floors"]
    held = [set(re.findall(r"\w+", layer)) for layer in layers]
    picture, _before = (block for block in blocks(ROOT / "CONTRIBUTING.md") if block[0] == "__main__")
    drawn = [set(line.split()) for line in picture if line]
    assert drawn == held
    standing = {room: number for number, floor in enumerate(reversed(drawn)) for room in floor}
    for room, targets in rooms(modules()).items():
        if room != "dist_spin":  # the public `load` in its __init__.py reaches up, when it is called
            assert [target for target in targets if standing[target] >= standing[room]] == [], room


def test_the_figures_of_the_picture_are_counted() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    graph = rooms(modules())
    figures = [
        int(re.findall(r"\d+", line)[-1]) for line in text.splitlines() if line.startswith(("| rooms", "| floors"))
    ]
    assert figures == [len(graph) + len(["slurm", "benchmarks", "setup.py"]), max(floors(graph).values())]


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_main_loop_and_every_page_are_a_click_from_the_readme() -> None:
    links = set(re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert "dist_spin/optimize/train.py" in links
    assert {name(page) for page in PAGES if page.parent.name == "docs"} <= links


def test_every_benchmark_and_exit_code_has_its_line() -> None:
    commands = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
    assert commands == sorted(
        re.findall(r"^\| `python benchmarks/(\w+\.py)", (ROOT / "benchmarks/README.md").read_text(), re.M)
    )
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes


MISTAKES = ROOT / "docs" / "mistakes.md"  # its wrong names are meant: tests/test_mistakes.py types them
RIGHT_PAGES = [page for page in PAGES if page != MISTAKES]


def code(page: Path) -> str:
    """What a page sets as code: the indented blocks, and what stands between backticks."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*("\n".join(block) for block in blocks(page)), *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("page", RIGHT_PAGES, ids=name)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    groups = {field.name: field.type for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)}
    named = re.findall(rf"(?<![\w/.])({'|'.join(groups)})\.([a-z]\w*)(?![\w/(])", code(page))
    files = {"py", "md", "json", "yaml", "jsonl", "html", "sbatch"}
    unknown = {f"{g}.{k}" for g, k in named if k not in {f.name for f in dataclasses.fields(groups[g])} | files}
    assert unknown == set()


def test_pages_name_settings_and_verbs_at_all() -> None:
    everything = "\n".join(map(code, PAGES))
    assert len(set(re.findall(r"\b(?:optimize|quantize|quant)\.[a-z]\w*", everything))) > 12
    assert len(set(re.findall(r"dist-spin ([a-z]+)", everything))) > 8


@pytest.mark.parametrize("page", RIGHT_PAGES, ids=name)
def test_every_verb_and_file_of_a_command_is_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    verbs = set(re.findall(r"[a-z]+", capsys.readouterr().out))
    commands = re.findall(r"(?:dist-spin|-m dist_spin) ([a-z]+)(.*)", code(page))
    assert {verb for verb, _ in commands} - verbs == set()
    paths = re.findall(r"(?<![\w/.$])((?:dist_spin|launch|configs|slurm|tests|benchmarks|docs)/[\w./-]*\w)", code(page))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
