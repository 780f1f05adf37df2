"""The help of a verb shows the settings that it reads: every read of a tiny run is recorded and held against it."""

import dataclasses
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tiny import tiny_run

from dist_spin.cli import VERBS, main
from dist_spin.config.run import RunConfig

GROUPS = {name: kind for name, kind in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)}
# Who reads settings without acting on them: checks, the loader, copies, and what writes them all down.
NOT_COUNTED = ("dist_spin.config.", "dataclasses")


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The settings that are read while the block runs, as `group.name`; `group` alone for one that is read as a whole."""
    read: set[str] = set()

    def recording(group: str, kind: Any) -> Any:
        names = {field.name for field in dataclasses.fields(kind)}

        def getattribute(self: Any, name: str) -> Any:
            if name in names or name == "__dict__":
                reader = sys._getframe(1).f_globals.get("__name__", "")
                if not reader.startswith(NOT_COUNTED):
                    read.add(group if name == "__dict__" else f"{group}.{name}")
            return object.__getattribute__(self, name)

        return getattribute

    with pytest.MonkeyPatch.context() as patch:
        for group, kind in GROUPS.items():
            patch.setattr(kind, "__getattribute__", recording(group, kind))
        yield read


STAGES = ("optimize", "quantize", "evaluate", "export", "compare", "report")


@pytest.fixture(scope="module")
def read_by(tmp_path_factory) -> dict[str, set[str]]:
    """Verb -> what it read of the settings of a tiny run."""
    words = tiny_run(
        tmp_path_factory.mktemp("run"),
        "model.dtype=float32",
        "rotation.online=false",
        "compare.methods=[rtn,smoothquant,spinquant_no_had]",
        "compare.bits=[W4A4KV4]",
        "compare.weights=[rtn]",
        "compare.seeds=[0]",
        *("export.target=compressed-tensors", "quant.a_bits=8", "quant.a_symmetric=true"),
        *("quant.k_bits=16", "quant.v_bits=16"),
    )
    found = {}
    for verb in STAGES:
        with recorded() as read:
            assert main([verb, *words]) == 0
        found[verb] = read
    return found


def is_read(entry: str, read: set[str]) -> bool:
    """Whether a group or a single setting of it was read, alone or as part of the whole."""
    return any(key in (entry, entry.partition(".")[0]) or key.startswith(f"{entry}.") for key in read)


@pytest.mark.parametrize("verb", STAGES)
def test_the_help_of_a_verb_shows_what_it_reads_and_nothing_else(read_by, verb):
    shown, read = VERBS[verb].reads, read_by[verb]
    assert [key for key in sorted(read) if key not in shown and key.partition(".")[0] not in shown] == []
    assert [entry for entry in shown if not is_read(entry, read)] == []


def test_verbs_that_start_stages_show_what_those_read_and_the_number_of_processes():
    for verb in ("run", "submit"):
        shown = set(VERBS[verb].reads)
        for stage in ("optimize", "quantize", "evaluate", "report", "export"):
            assert {entry for entry in VERBS[stage].reads if not {entry, entry.partition(".")[0]} & shown} == set()
        assert is_read("distributed.nproc", shown)
