"""The files of finished measurements: RUN/evaluations/IDENTITY.json, one for each model on each text or task.

IDENTITY hashes everything that decides the figures, so a second start, or another run of a comparison that comes to the same
model, takes them from the file. A perplexity is one row, a task is a list of rows, one for each of its metrics. Each row carries
a checksum (`storage.checked_json`); a file that cannot be trusted is set aside, said, and measured again.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from dist_spin.runtime.distributed import on_rank0
from dist_spin.runtime.progress import warn
from dist_spin.storage.atomic import write_json
from dist_spin.storage.checked_json import add_checksum, read_json, remove_checksum
from dist_spin.storage.results import makes_sense
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import CorruptFile, load_if_current

Rows = list[dict[str, Any]]


def measurement_path(run: RunDir, identity: str) -> Path:
    """The file of the measurement whose deciding settings and data hash to `identity`."""
    return run.path / "evaluations" / f"{identity}.json"


def save_rows(run: RunDir, identity: str, rows: Rows) -> None:
    """Write the rows of a measurement, atomically and with checksums; called by all ranks together, rank 0 writes."""
    entries = [add_checksum({**row, "identity": identity}) for row in rows]
    one = "ppl" in rows[0]
    on_rank0(lambda: write_json(measurement_path(run, identity), entries[0] if one else entries))


def load_rows(run: RunDir, identity: str) -> Rows | None:
    """The rows of a measurement; None where there are none, or where its file was damaged and is now set aside.

    Called by all ranks together; rank 0 reads.
    """
    path = measurement_path(run, identity)
    return on_rank0(
        lambda: load_if_current(path, read_rows, lambda measured_as: measured_as == identity, "measuring again", warn)
    )


def read_rows(path: Path) -> tuple[Rows, str]:
    """The rows of a measurement's file, and the identity under which they were measured.

    Raises:
        CorruptFile: the file is torn or damaged, or holds something else.
    """
    content = read_json(path)
    entries = content if isinstance(content, list) else [content]
    try:
        rows = [remove_checksum(entry, _makes_sense) for entry in entries]
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}") from error
    if not rows:
        raise CorruptFile(f"{path}: holds no figures")
    # The rows of tasks of version 0.1 do not tell their identity; the file's name does.
    identities = {str(row.pop("identity", path.stem)) for row in rows}
    return rows, identities.pop() if len(identities) == 1 else "of several measurements"


def _makes_sense(row: dict[str, Any]) -> bool:
    """Whether a row without a checksum may be used: a perplexity must agree with the losses of its windows."""
    if not makes_sense(row):
        return False
    if "ppl" not in row:
        return True
    losses = row.get("losses") or [math.nan]
    return math.isclose(math.log(row["ppl"]), fmean(losses), abs_tol=1e-9)
