"""Write a run's model for another program, layer by layer; the directory appears when it is complete.

    dist-spin export runs/NAME --format compressed-tensors
    dist-spin export CONFIG.yaml --format gguf --output DIR export.gguf_converter=download

The run must be one: rotations, layers and model of another making are refused, and nothing of the run is changed.
"""

import shutil
from pathlib import Path

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.export.card import model_card
from dist_spin.export.directory import foreign_files, list_files, whole_directory
from dist_spin.export.export_job import ExportJob
from dist_spin.export.formats import FORMATS
from dist_spin.export.sidecar import NAME, read_description, read_sidecar
from dist_spin.pipeline.export_limits import check_clips, check_target
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import build_variant
from dist_spin.runtime.distributed import World
from dist_spin.runtime.progress import say, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import user_error, write_text
from dist_spin.storage.rotations import finished_rotations
from dist_spin.storage.run_directory import LEARNED, run_dir


def export(config: RunConfig, world: World, target: str, output: Path | None = None) -> Path:
    """Write the learned model in the format `target` to `output` (default: RUN/export/FORMAT); returns the directory.

    Raises:
        Interrupted: a signal came; nothing is left of the attempt.
        UserError: the format has no place for the run's settings, or the run is incomplete, damaged or mixed.
    """
    if world.size > 1:
        raise UserError("export is the work of one process", "start it without torchrun")
    stop = StopRequest()
    files = open_configured_model(config)
    check_target(target, config, files.config, starting=False)
    run = run_dir(config)
    directory = output or run.export / target
    learned = build_variant(config, files, LEARNED, world.device)
    check_clips(target, config, clips=learned.sites.clips is not None)
    job = ExportJob(config, run, files, learned, target, stop)
    job.check_run()
    finished_rotations(run, warn)  # which makes R.bin again if that is damaged
    if finished(directory, job.fingerprint):
        say(f"{directory} is complete")
        return directory
    check_replaceable(directory, f"{config.name}.gguf")
    export_format = FORMATS[target]
    write = export_format.prepare(job)
    with whole_directory(directory) as partial:
        write(partial)
        for name in ("final.safetensors", "R.bin"):
            (partial / "dist_spin").mkdir(exist_ok=True)
            shutil.copyfile(run.rotations / name, partial / "dist_spin" / name)
        write_text(partial / "README.md", model_card(job, export_format.loading(job)))
        list_files(partial)
    run.event("export", format=target, path=str(directory))
    say(f"wrote {directory}")
    if job.sites.r4:
        who = export_format.r4_applied_by
        say(f"R4 is online: {who} applies it, transformers' from_pretrained stops with an error; see README.md there")
    return directory


def check_replaceable(directory: Path, gguf: str) -> None:
    """Refuse to write where something lies that no export made.

    Args:
        gguf: the name that the run's GGUF file has.

    Raises:
        UserError: names what is in the way.
    """
    try:
        occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
        exported = occupied and (directory / NAME).exists()
    except OSError as error:
        raise user_error(error, directory) from error
    if occupied and not exported:
        raise UserError(f"{directory} exists and is no export", "give another --output, or remove it")
    if exported and (foreign := [name for name in foreign_files(directory) if name != gguf]):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        problem = f"{directory} is to be written again, but holds {foreign[0]}{more}, which no export wrote"
        raise UserError(problem, "move that away, or give another --output")


def finished(directory: Path, fingerprint: str) -> bool:
    """Whether a whole export of the same content is there."""
    try:
        description = read_description(directory)
        if FORMATS[description["format"]].loads_here:
            read_sidecar(directory)
        return description["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, UserError):
        return False
