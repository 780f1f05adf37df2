"""`accelerate launch` starts the ranks, and its config picks the engine."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port
from safetensors.torch import load_file
from tiny import tiny_run

from dist_spin.storage.atomic import read_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
{section}
main_process_port: {port}
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""
ENGINES = {
    "fsdp": ("FSDP", "fsdp_config: {fsdp_version: 2}"),
    "deepspeed": ("DEEPSPEED", "deepspeed_config: {zero_stage: 3, gradient_accumulation_steps: 1}"),
}


def test_the_config_of_accelerate_picks_the_engine_and_the_result_is_one(tmp_path: Path) -> None:
    found = []
    for engine, (kind, section) in ENGINES.items():
        settings = tmp_path / f"{engine}.yaml"
        settings.write_text(CONFIG.format(kind=kind, section=section, port=free_port()))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
        words = tiny_run(tmp_path, f"name={engine}", "optimize.batch_size=3", "optimize.steps=2")
        done = subprocess.run(
            [*command, "-m", "dist_spin", "optimize", *words], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        start = next(e for e in read_lines(tmp_path / engine / "events.jsonl") if e["event"] == "start")
        assert (start["engine"], start["ranks"]) == (engine, 2)
        found.append(load_file(tmp_path / engine / "rotations" / "final.safetensors"))
    for name in ("R1", "R2"):
        assert (found[0][name] - found[1][name]).abs().max() < 1e-12
