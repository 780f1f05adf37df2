"""docs/failures.md names tests that are there, at least ten neighbours for each kind of case, and a test for every exit code."""

import re
from collections import Counter
from pathlib import Path

import pytest

from dist_spin import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)(?:\[([^\]`]+)\])?`")
KINDS = {text.partition("\n")[0]: text for text in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
CASES = [kind for kind in KINDS if kind != "Exit codes"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_test_of_the_page_is_there(kind: str) -> None:
    named = TEST.findall(KINDS[kind])
    assert named
    assert KINDS[kind].count("`tests/") == len(named)
    for file, name, case in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {name}\(", source, re.MULTILINE), (file, name)
        assert f'"{case}"' in source or not case, (file, case)


@pytest.mark.parametrize("kind", CASES)
def test_every_case_has_its_test_and_its_kind_ten_neighbours(kind: str, request: pytest.FixtureRequest) -> None:
    rows = re.findall(r"^\| (?!Case|---)(.*) \|$", KINDS[kind], re.MULTILINE)
    assert rows
    assert all(len(row.split(" | ")) == 4 and TEST.search(row) for row in rows)
    (least, neighbours), *more = re.findall(r"^Neighbours \(at least (\d+)\): ([^.]*(?:\.py[^.]*)*)", KINDS[kind], re.M)
    assert not more
    assert int(least) >= 10
    collected = Counter((Path(item.path), item.function.__name__) for item in request.session.items)  # type: ignore[attr-defined]
    found = [collected[ROOT / file, name] for file, name, _ in TEST.findall(neighbours)]
    if all(found):  # this session has collected all of these files
        assert sum(found) >= int(least)


def test_every_exit_code_has_a_test() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \| `tests/", KINDS["Exit codes"], re.MULTILINE)]
    assert sorted(codes) == sorted(value for name, value in vars(errors).items() if name.startswith("EXIT_"))
