"""The import graph of the code: who imports whom, circles of imports, and the layer ("floor") of each file and folder ("room").

    python tests/house.py [CHECKOUT]      the figures of CONTRIBUTING.md

A room is a file or folder directly under `dist_spin/`, where `launch` is a link to the folder at the top. Its floor is one more
than the highest floor among the rooms that it imports; a room that imports nothing of ours stands on floor 1.
"""

import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

Graph = dict[str, set[str]]  # name -> the names that it imports


def imports(*packages: str) -> Graph:
    """The modules of the packages (default: dist_spin), with every import in them, those inside functions included."""
    graph = grimp.build_graph(*(packages or ("dist_spin",)), cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in sorted(graph.modules)}


def contents(modules: Graph, folder: str) -> Graph:
    """The imports between what lies directly in a folder (dotted, "" for the top): its files, and its folders as wholes.

    The folder's own `__init__.py` is left out: it is the folder.
    """
    depth = len(folder.split(".")) + 1 if folder else 1

    def child(module: str) -> str:
        parts = module.split(".")
        return (
            ".".join(parts[:depth]) if len(parts) >= depth and (not folder or module.startswith(f"{folder}.")) else ""
        )

    graph: Graph = {}
    for module, targets in modules.items():
        if own := child(module):
            graph.setdefault(own, set()).update({child(target) for target in targets} - {own, ""})
    return graph


def rooms(modules: Graph) -> Graph:
    """The imports between rooms; the one of `dist_spin/__init__.py` is called `dist_spin`."""

    def room(module: str) -> str:
        top, _, rest = module.partition(".")
        return rest.partition(".")[0] if rest and top == "dist_spin" else top

    graph: Graph = {}
    for module, targets in modules.items():
        graph.setdefault(room(module), set()).update({room(target) for target in targets} - {room(module)})
    return graph


def circle(graph: Graph) -> list[str]:
    """Names of which each imports the one before, the first of them again at the end; empty where no imports run in a circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> dict[str, int]:
    """The floor of every room of a graph without circles."""
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = 1 + max((floor[target] for target in graph[name]), default=0)
    return floor


def file_lines(checkout: Path) -> dict[tuple[str, ...], int]:
    """The number of lines of every file of `dist_spin/` and `launch/`, by the parts of its path."""
    folders = [
        checkout / "dist_spin",
        *(p for p in (checkout / "dist_spin").iterdir() if p.is_dir()),
        checkout / "launch",
    ]
    paths = sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})
    return {
        path.relative_to(checkout.resolve()).parts: len(path.read_text(encoding="utf-8").splitlines()) for path in paths
    }


def main() -> None:
    """Print the figures of a checkout."""
    sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else ".")
    linked = (
        Path(sys.path[0]) / "dist_spin" / "launch"
    ).exists()  # before it was, launch was a package beside dist_spin
    graph = rooms(imports() if linked else imports("dist_spin", "launch"))
    floor = floors(graph)
    for number in range(max(floor.values()), 0, -1):
        print(f"{number:2}  " + "  ".join(sorted(name for name in floor if floor[name] == number)))
    print(f"{len(graph)} rooms, {max(floor.values())} floors, {sum(map(len, graph.values()))} arrows")
    lines = file_lines(Path(sys.path[0]))
    share: Counter[str] = Counter()
    for (top, *inner), count in lines.items():
        share[inner[0].removesuffix(".py") if top == "dist_spin" else top] += count
    room, most = share.most_common(1)[0]
    longest = max(lines, key=lines.__getitem__)
    print(
        f"largest room: {room}, {most / share.total():.0%} of the lines; longest file: {'/'.join(longest)}, {lines[longest]}"
    )


if __name__ == "__main__":
    main()
