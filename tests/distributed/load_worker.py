"""One rank of the streaming test: build, shard and load a model; print this rank's peak memory above its own imports.

torchrun --nproc_per_node 2 load_worker.py MODEL_DIR cpu|cuda
"""

import json
import sys
import time

import torch

from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.optimize.sharding.fsdp import Fsdp
from dist_spin.runtime.distributed import start, stop


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main() -> None:
    """Load and report."""
    world = start(sys.argv[2], 300, 1)
    files = open_model(sys.argv[1])
    r4 = kronecker_factors(files.shape.intermediate, 0, dtype=torch.float64, device="cpu")
    rotations = Rotations(*initial("identity", files.shape, 0), world.device, torch.bfloat16)
    sites = Sites(a=QuantSpec(4), r4=r4)
    baseline = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # start the peak anew
    began = time.monotonic()
    model = FakeQuantModel(files.config, rotations, sites, device=world.device, dtype=torch.bfloat16)
    engine = Fsdp()
    engine.shard(model, world)
    engine.load(model, files.weights, r4)
    shard = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    seconds = round(time.monotonic() - began, 2)
    print(json.dumps({"above": memory("VmHWM") - baseline, "shard": shard, "seconds": seconds}), flush=True)
    stop()


main()
