"""Every row of docs/mistakes.md: the command is typed, and gets the exit code and the lines that the page says."""

import sys
from pathlib import Path

import pytest
from mistakes import answer, prepare, row, rows

ROWS = rows()

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mistakes")
    prepare(place)
    return place


def test_there_are_many_and_each_is_another():
    assert len({command for command, _, _ in ROWS}) == len(ROWS) >= 50


@pytest.mark.parametrize(("command", "code", "lines"), ROWS, ids=[command for command, _, _ in ROWS])
def test_a_mistake_gets_the_line_of_the_page(command, code, lines, directory, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "stdin", None)  # nobody is there to be asked
    before = sorted(directory.glob("*"))
    assert answer(command) == (code, lines)
    assert code in (2, 3)
    assert all(len(line) < 420 and "; " in line for line in lines if "did you mean" not in line)
    assert sorted(directory.glob("*")) == before  # a command that is refused makes no file


@pytest.mark.parametrize("text", ["plain", "a|b", "with `code` in it", "a\\b", " x"])
def test_rows_are_read_as_they_are_written(text, tmp_path, monkeypatch):
    monkeypatch.setattr("mistakes.PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(row("dist-spin x a|b", 2, [text, "more"]) + "\n")
    assert rows() == [("dist-spin x a|b", 2, [text, "more"])]
