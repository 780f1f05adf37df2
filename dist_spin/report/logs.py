"""The end of everything that the jobs of a run printed.

dist-spin logs runs/quickstart
"""

from pathlib import Path

from dist_spin.report.jobs import jobs_of, run_events
from dist_spin.runtime.slurm import output_files
from dist_spin.storage.run_directory import RunDir

LAST_LINES = 20  # of each file


def logs(path: Path) -> str:
    """The last lines of each file that holds what a job of the run printed, oldest file first, each file once.

    Raises:
        UserError: `path` is no run directory.
    """
    found = [file for file in sorted(RunDir(path).logs.rglob("*")) if file.suffix in (".log", ".out", ".err")]
    for job in jobs_of(run_events(path)):
        found += output_files(job["job"])
    # Slurm gives absolute paths; the same file may have been found below a relative one or through a link.
    files: dict[Path, Path] = {}
    for file in found:
        if file.is_file() and file.stat().st_size:
            files.setdefault(file.resolve(), file)
    texts = []
    for file in sorted(files.values(), key=lambda f: f.stat().st_mtime):
        lines = file.read_text(errors="replace").splitlines()
        texts.append("\n".join([f"==> {file}", *lines[-LAST_LINES:]]))
    return "\n\n".join(texts) or "no job has printed anything yet; what is started in a terminal prints there"
