"""What `--slurm key=value` means, for every verb that hands jobs to Slurm."""

from typing import Any

import submitit

from dist_spin.errors import UserError


def slurm_settings(words: list[str], *, ranks: int, gpu: bool) -> dict[str, Any]:
    """submitit's parameters from `key=value` words: its own names, and every other option of sbatch by its long name.

    Args:
        ranks: processes per node. gpu: whether each takes one, unless the words say otherwise.

    Raises:
        UserError: a word is not `key=value`.
    """
    settings: dict[str, Any] = {"slurm_time": 240, "slurm_signal_delay_s": 120, "slurm_ntasks_per_node": 1}
    settings |= {"slurm_gpus_per_node": ranks} if gpu else {"slurm_cpus_per_task": ranks}
    extra: dict[str, Any] = {}
    known = submitit.SlurmExecutor._valid_parameters()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--slurm {word} sets nothing", "write --slurm key=value, such as partition=gpu")
        value: Any = int(text) if text.isdigit() else text
        key = key.replace("-", "_")
        if key == "nodes":
            settings["nodes"] = value
        elif key == "setup":  # shell lines, may be given several times
            settings.setdefault("slurm_setup", []).append(text)
        elif key in known:
            settings[f"slurm_{key}"] = value
        else:
            extra[key.replace("_", "-")] = value
    return settings | ({"slurm_additional_parameters": extra} if extra else {})
