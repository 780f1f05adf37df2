"""What several stages build from a configuration in the same way."""

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_spin.distributed import World, on_leader, together
from dist_spin.environment import environment
from dist_spin.errors import Interrupted, UserError
from dist_spin.export.target import check_target
from dist_spin.lock import stage_lock
from dist_spin.model.architecture import Shape
from dist_spin.model.loading import ModelFiles, open_model
from dist_spin.model.rotation import CLIPS, Sites, initial
from dist_spin.numerics.hadamard import NoHadamard, kronecker_factors, largest_block
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.rotation_files import clip_bits, load_rotations, load_transforms
from dist_spin.rundir import RunDir
from dist_spin.settings import RunConfig

ENDS_SETTINGS = ("quant.embedding_bits", "quant.head_bits")  # decide nothing about layers
WEIGHT_SETTINGS = ("quant.w_", "quant.down_bits", *ENDS_SETTINGS)  # beginnings of what decides weights alone


def say(text: str) -> None:
    """One line to the user, on stderr: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def run_dir(config: RunConfig) -> RunDir:
    """The run directory that a configuration names."""
    return RunDir(Path(config.output_dir) / config.name)


@contextlib.contextmanager
def writing(config: RunConfig, world: World, stage: str, part: str = "") -> Iterator[None]:
    """Around a stage: rank 0 holds the run's lock of this stage and notes where and with what it runs, and what it took.

    Raises:
        Held: another process works on the same stage or part.
    """
    run = run_dir(config)
    new = on_leader(lambda: not run.path.exists())
    with contextlib.ExitStack() as held:
        on_leader(lambda: held.enter_context(stage_lock(run.path, stage, part)))
        about = environment(world)
        on_leader(lambda: run.event("job", stage=stage, part=part, **about))
        began = time.monotonic()

        def note(outcome: str, memory: dict[str, int]) -> None:
            if world.leads:
                seconds = round(time.monotonic() - began, 3)
                run.event("stage_end", stage=stage, part=part, outcome=outcome, seconds=seconds, **memory)

        try:
            yield
            note("done", peak_memory(world))
        except Interrupted:
            note("interrupted", own_peak_memory(world))  # the others may not have left together
            raise
        except UserError:
            if new and world.leads and not (run.path / "config.yaml").exists():
                (run.path / "events.jsonl").unlink(missing_ok=True)  # a start that failed leaves no mark
            raise


def own_peak_memory(world: World) -> dict[str, int]:
    """The most memory that this rank has used so far, bytes: of the host (resident), and of its GPU if it has one."""
    found = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    if world.device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(world.device)
    return found


def peak_memory(world: World) -> dict[str, int]:
    """The same of the rank that used most; every rank calls it."""
    own = own_peak_memory(world)
    most = torch.tensor(list(own.values()))
    if world.size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return dict(zip(own, most.tolist(), strict=True))


def model_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of weights and compute."""
    return getattr(torch, config.model.dtype)


def wide_dtype(config: RunConfig) -> torch.dtype:
    """What layers are learned and Hessians summed in: fp32, or fp64 for an fp64 model."""
    return torch.promote_types(model_dtype(config), torch.float32)


def open_configured_model(config: RunConfig) -> ModelFiles:
    """Open the model on every rank; what has to be downloaded or converted is so once, by rank 0.

    Raises:
        UserError: it cannot be opened, or no runtime of `export.target` would take what the settings make of it.
    """

    def find() -> ModelFiles:
        return open_model(
            config.model.path,
            revision=config.model.revision,
            dtype=model_dtype(config),
            dummy=config.model.dummy_weights,
            trust_remote_code=config.model.trust_remote_code,
        )

    files: list[ModelFiles] = []
    on_leader(lambda: files.append(find()))  # not returned: open files do not travel
    # The others only after it is there; one of them may be on a host that does not see the path.
    together(lambda: None if files else files.append(find()))
    if config.export.target != "none":
        check_target(config.export.target, config, files[0].config, starting=True)
    return files[0]


def hadamard_factors(size: int, block: int, setting: str) -> tuple[Tensor, ...]:
    """fp64 Kronecker factors of the online Hadamard of `size`, or of blocks of it.

    Raises:
        UserError: nobody knows a Hadamard matrix of this order; names the largest block that works.
    """
    try:
        if block and size % block:
            raise UserError(
                f"{setting}={block} does not divide {size}", f"use {largest_block(size)}, or 0 for all of it"
            )
        return kronecker_factors(size, block, dtype=torch.float64, device="cpu")
    except NoHadamard as error:
        raise UserError(str(error), f"set {setting}={largest_block(size)} for a block-Hadamard") from error


def sites_for(config: RunConfig, shape: Shape, *, rotated: bool = True, heads: bool = False) -> Sites:
    """The sites of a configuration; an unrotated baseline has no online Hadamards.

    heads: QuaRot's Hadamard across the heads that o_proj reads, over the largest block of heads that has one.

    Raises:
        UserError: a group size does not fit the model, or an order has no Hadamard.
    """
    q, d = config.quant, shape.head_dim
    for which in ("k", "v"):
        group = getattr(q, f"{which}_group_size")
        if group and d % group:
            raise UserError(
                f"quant.{which}_group_size={group} does not divide this model's head size {d}", f"use {d}, or 0 for it"
            )
    inputs = {shape.hidden, shape.heads * d, shape.intermediate}
    if q.w_group_size and any(size % q.w_group_size for size in inputs):
        common = math.gcd(*inputs)
        raise UserError(
            f"quant.w_group_size={q.w_group_size} does not divide this model's input sizes "
            f"{', '.join(map(str, sorted(inputs)))}",
            f"use {common & -common}, or 0 for whole rows",  # the largest power of two that does
        )

    def spec(which: str, default_group: int) -> QuantSpec:
        values = vars(q)
        group = values.get(f"{which}_group_size") or default_group
        return QuantSpec(values[f"{which}_bits"], values[f"{which}_symmetric"], group, values[f"{which}_clip_ratio"])

    half_steps = q.arithmetic == "compressed-tensors" and q.a_symmetric
    a = dataclasses.replace(spec("a", 0), half_steps=half_steps)
    online = config.rotation.online and rotated
    block = largest_block(shape.heads)
    return Sites(
        a=a,
        o=dataclasses.replace(a, group_size=d if q.o_per_head else 0),
        k=spec("k", d),
        v=spec("v", d),
        r3=hadamard_factors(d, 0, "rotation.online") if online and q.k_bits < 16 else (),
        r4=hadamard_factors(shape.intermediate, config.rotation.r4_block, "rotation.r4_block") if online else (),
        heads=hadamard_factors(shape.heads, block, "rotation.online") if online and heads and block > 1 else (),
    )


def while_learning(config: RunConfig) -> RunConfig:
    """The configuration whose sites learning sees: activations, keys and values at `optimize.a_bits`, if that is given."""
    bits = config.optimize.a_bits
    if not bits:
        return config
    return dataclasses.replace(config, quant=dataclasses.replace(config.quant, a_bits=bits, k_bits=bits, v_bits=bits))


def site_bits(config: RunConfig) -> dict[str, int]:
    """Bits of activations ("a"), keys ("k") and values ("v")."""
    return {"a": config.quant.a_bits, "k": config.quant.k_bits, "v": config.quant.v_bits}


def clips_at(config: RunConfig, learned_at: dict[str, int], clips: Tensor) -> Tensor:
    """Learned clip ratios [layers, CLIPS] for the sites of `config`: 1 wherever its bits are not those they were learned at.

    What 4 bits gain by giving up the ends of the range, more bits lose by it. learned_at: `site_bits` of the learning.
    """
    bits = site_bits(config)
    kept = [bits[kind] == learned_at[kind] for kind in (site if site in bits else "a" for site in CLIPS)]
    return torch.where(torch.tensor(kept, device=clips.device), clips, 1.0)


def learned_transforms(path: Path, config: RunConfig) -> dict[str, Tensor]:
    """What `load_transforms` reads, its clips for the bits of `config`. A file that does not say its bits is taken as it is."""
    transforms = load_transforms(path)
    if "clip" in transforms and (learned_at := clip_bits(path)):
        transforms["clip"] = clips_at(config, learned_at, transforms["clip"])
    return transforms


def check_vocabulary(tokens: Tensor, shape: Shape, source: str) -> Tensor:
    """`tokens`, if the model has an embedding for each; pre-tokenised data may belong to another model.

    Raises:
        UserError: a token id is beyond the vocabulary.
    """
    highest = int(tokens.max())
    if highest >= shape.vocab:
        raise UserError(
            f"{source} holds token id {highest}, but the model's vocabulary has {shape.vocab}",
            "tokenise with this model's tokenizer",
        )
    return tokens


def starting_rotations(config: RunConfig, shape: Shape) -> tuple[Tensor, Tensor]:
    """R1 and R2 that learning starts from, fp64: seeded, fitted (`stages.start`), or read from `rotation.load`.

    Raises:
        UserError: they are to be fitted and are not yet, or their file cannot be read.
    """
    sizes = shape.hidden, shape.head_dim, shape.layers
    if config.rotation.load:
        return load_rotations(Path(config.rotation.load), *sizes)
    if fits_start(config):
        if not start_path(config).exists():
            raise UserError(
                "the start of the rotations (rotation.init=range) is not fitted", "run `dist-spin optimize` first"
            )
        return load_rotations(start_path(config), *sizes)
    return initial(config.rotation.init, shape, config.rotation.seed)


def fits_start(config: RunConfig) -> bool:
    """Whether rotations start from what activations say (`stages.start`)."""
    return config.rotation.init == "range" and not config.rotation.load


def start_path(config: RunConfig) -> Path:
    """Where `rotation.init=range` keeps what it found."""
    return run_dir(config).rotations / "start.safetensors"


def flat(settings: Any, prefix: str) -> dict[str, Any]:
    """The fields of a settings dataclass as `prefix.field`, for fingerprints."""
    return {f"{prefix}.{name}": value for name, value in vars(settings).items()}
