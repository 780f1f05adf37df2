"""What a run will take, before it is started: seconds and memory of every part, from the shape, the settings and the GPUs.

Learning follows `scaling_model`, GPTQ its products and factorisations at measured rates, the rest bytes over the rate at which
they are read, merged or written. Rates were measured on H200s (docs/performance.md); `Gpu.speed` scales them. tests/test_plan.py
holds the model against every row measured: steps, GPTQ of a layer, stages as commands of their own and a whole run on one GPU.
Seconds and memory are within 15 %, but for the memory of learning with quantised weights, of which up to a fifth less was used
than is planned for, and that of learning with symmetric activations, of which about half was.
"""

import math
from dataclasses import dataclass, field

from dist_spin.bench import scaling_model as scaling
from dist_spin.bench.scaling_model import DTYPE, GIB, mean_layer_bytes
from dist_spin.bench.stage_costs import (
    code_bytes,
    forward_flop,
    hessian_flop,
    model_bytes,
    vocab_bytes,
)
from dist_spin.config.run import RunConfig
from dist_spin.evaluate.teacher import HOST_SHARE as STATES_SHARE
from dist_spin.model.architecture import Shape
from dist_spin.numerics.cayley import ITERATIONS
from dist_spin.optimize.sharding.memory_planner import (
    HOST_SHARE,
    SPARE_SHARE,
    Workload,
    fewest_or_fastest,
    layer_bytes,
    within,
)
from dist_spin.optimize.stored_teacher import entry_bytes
from dist_spin.pipeline.range_init import STEPS as FIT_STEPS
from dist_spin.pipeline.range_init import TOKENS as FIT_TOKENS
from dist_spin.quantize.tune import BATCH as TUNE_BATCH

# Of one H200, fitted to the rows of docs/performance.md and, of experts, docs/models.md.
LINK, COPY, CONTENTION = 375e9, 4000e9, 0.3  # as `bench scaling` has them
RATE, ROUNDED_RATE = 625e12, 559e12  # FLOP/s of learning with 16-bit weights, and with fewer bits
OVERHEAD = 3.9e-7  # seconds per layer and pass, times the hidden size
REQUANTIZE = 7.9e-11  # seconds per weight on one GPU, in each step that learns with fewer weight bits
LOGIT = (
    2e-11  # seconds of the loss for each logit: of a large vocabulary they are read and written more often than counted
)
EXPERT_ROWS = 1.05e-11  # seconds for each value of the rows that experts read and write: sorted, rounded and summed
SYMMETRIC = 0.88  # times that a step takes with symmetric activations; measured together with R4 in blocks of 2048
STEP_END, CAYLEY = (
    4.8e-3,
    1.3e-13,
)  # seconds of all-reduce and checkpoint; of the Cayley step of R1, times hidden ** 3 over ranks
SCALES, KL = 1.2, 1.3  # times that a step takes with scales or clips; besides with the divergence from the original
FORWARD, HESSIAN, FACTOR, SOLVE, ERRORS, MERGE = 563e12, 510e12, 52e12, 20e12, 52e12, 43e12  # FLOP/s of parts of GPTQ
EXPERT = (
    1.8e-5  # seconds of GPTQ for each expert's matrices times inputs ** 0.75: they are too small to keep a GPU busy
)
FP32, TF32 = 50e12, 350e12  # FLOP/s of large products, of which the fitted start is made
# Not of the GPU.
START = 7.6  # seconds before a process starts its work and after it: imports, CUDA, NCCL
IMPORTS = 6.6  # of them are over before the turn of a stage of `run` that follows another (launch/next_stage.py)
OPENING = 1.5  # seconds from there to its first layer: headers, rotations and their checksums
KERNELS = 2.0  # seconds of the first layer of GPTQ beyond the others
COMPILE, MEETING = 10.5, 13.5  # seconds of the first step beyond the others; besides on several GPUs
LOAD = 3.7e9  # bytes/s at which one process fills the weights of learning from the page cache
READ = 7e9  # bytes/s at which one process passes weights of layer after layer from the page cache to its GPU
WAITING = 0.1  # seconds of GPTQ of a layer in which the GPU waits for Python
DRAWING, PROBES = 9.5, 0.05  # seconds of all figures of a report, and of what is found of the activations of a layer
WRITER = 1.2e9  # bytes/s at which one thread writes a file, or several into memory that was not used before
STATES = 2e9  # bytes/s at which stored hidden states are read, checked and rotated
PROCESS = 3 * GIB  # bytes of host memory that a process takes before it holds anything
HOST_LINK = 50e9  # bytes/s from pinned memory to one GPU


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. speed: of its products, times an H200's."""

    memory: float
    speed: float


GPUS = {"h200": Gpu(139 * GIB, 1.0), "h100": Gpu(79 * GIB, 0.95)}  # those that were measured


@dataclass(frozen=True)
class Hardware:
    """The GPUs of one host. host: bytes of its memory that are free. disk: bytes/s at which files are written."""

    gpus: int
    gpu: Gpu
    host: float
    disk: float

    @property
    def usable(self) -> float:
        """Bytes of one GPU beside its context and what fragmentation wastes."""
        return (1 - SPARE_SHARE) * self.gpu.memory - GIB

    def lacks(self, gpu: float, host: float) -> str:
        """Which memory does not hold so many bytes of one GPU and of the host; "" if both do."""
        return "GPU memory" if gpu > self.usable else "host memory" if host > self.host else ""

    def machine(self) -> scaling.Machine:
        """As the model of a step takes it."""
        return scaling.Machine(LINK, COPY, CONTENTION, self.gpu.memory)


@dataclass(frozen=True)
class Part:
    """One part of a run: seconds from the start of its processes, the most bytes of one GPU and of the host, written bytes.

    notes: what a user should know of how it was planned. lacks: what it does not fit into, "GPU memory", "host memory" or "".
    """

    seconds: float
    gpu: float
    host: float
    disk: float = 0.0
    notes: list[str] = field(default_factory=list)
    lacks: str = ""


def learning_point(config: RunConfig, shape: Shape, hardware: Hardware) -> tuple[scaling.Point, int]:
    """Passes and recomputation that `optimize` would choose, and the layers that it would keep in host memory."""
    o, d, machine = config.optimize, config.distributed, hardware.machine()
    ranks, shards = hardware.gpus, d.shard_ranks or hardware.gpus
    point = scaling.planned(shape, ranks, shards, o.batch_size, o.seq_len, shape.layers, o.w_bits, machine)
    if d.offload_layers < 0 and scaling.memory(shape, point) <= hardware.usable:
        return point, 0
    block = config.rotation.block
    workload = Workload(shape, point.share, o.seq_len, DTYPE, shards, o.w_bits, micro=o.micro_batch_size, block=block)
    total = int(hardware.gpu.memory)
    room = min(shape.layers, int(HOST_SHARE * hardware.host / (workload.layer * ranks)))
    offloaded = d.offload_layers
    if offloaded < 0:
        offloaded = fewest_or_fastest(workload, total - GIB, total, room)
    free = total - GIB - workload.rotations - vocab_bytes(shape) / shards - workload.reserved(total)
    micro, levels = within(workload, int(free) - (shape.layers - offloaded) * workload.layer, offloaded)
    counts = {level: levels.count(level) for level in set(levels)}
    return scaling.Point(ranks, shards, o.batch_size, o.seq_len, shape.layers, o.w_bits, micro, counts), offloaded


def step_seconds(config: RunConfig, shape: Shape, point: scaling.Point, offloaded: int, hardware: Hardware) -> float:
    """One learning step."""
    o, speed = config.optimize, hardware.gpu.speed
    fit = scaling.Fit(
        (RATE if o.w_bits == 16 else ROUNDED_RATE) * speed, OVERHEAD * shape.hidden if o.w_bits == 16 else 0.0
    )
    compute, copies, exposed, _ = scaling.layers_time(shape, point, fit, hardware.machine())
    tokens = point.micro_batches * point.tokens
    seconds = compute + exposed + (copies if point.shards > 1 else 0.0)  # FSDP2 gathers nothing from a single rank
    rows = shape.mean(lambda one: one.experts_per_token * (2 * one.hidden + 3 * one.intermediate))
    seconds += tokens * (LOGIT * shape.vocab + EXPERT_ROWS * shape.layers * rows) / speed
    layer = layer_bytes(shape, DTYPE, o.w_bits) / point.shards
    copied = point.micro_batches * 2 * offloaded * layer / HOST_LINK
    seconds = max(seconds, copied) if point.shards == 1 else seconds + copied
    if o.w_bits < 16:
        seconds += REQUANTIZE * shape.layers * mean_layer_bytes(shape) / DTYPE.itemsize / point.shards / speed
    seconds *= SYMMETRIC if config.quant.a_symmetric and config.quant.a_bits < 16 else 1.0
    seconds *= SCALES if o.scales or o.clips else 1.0
    seconds *= KL if o.objective != "cross_entropy" and not o.teacher_top_k else 1.0
    return seconds + STEP_END + CAYLEY * shape.hidden**3 / point.ranks / speed


def optimize(config: RunConfig, shape: Shape, hardware: Hardware) -> Part:
    """Learning the rotations."""
    o, ranks = config.optimize, hardware.gpus
    point, offloaded = learning_point(config, shape, hardware)
    step = step_seconds(config, shape, point, offloaded, hardware)
    layer = layer_bytes(shape, DTYPE, o.w_bits) / point.shards
    gpu = scaling.memory(shape, point) - offloaded * layer
    pinned = offloaded * layer * ranks
    rotations = 4 * (shape.hidden**2 + shape.layers * shape.head_dim**2)
    levels = ", ".join(f"{count} layers keep {level}" for level, count in sorted(point.levels.items()))
    notes = [f"{step:.2f} s a step in {point.micro_batches} x {point.micro} sequences a GPU (recompute: {levels})"]
    if offloaded:
        notes.append(f"{offloaded} of {shape.layers} layers lie in host memory and are copied in")
    start = guard = 0.0
    if config.rotation.init == "range":
        start = fitted_start_seconds(shape, hardware)
        notes.append(f"{start:.0f} s of it fit the start")
    if o.guard_every:
        times = 1 + math.ceil(o.steps / o.guard_every)
        guard = times * step / 3 * o.guard_sequences / o.batch_size  # forward alone
        notes.append(f"{guard:.0f} s of it measure the held-out loss, {times} times")
    stored, storing = 0.0, 0.0
    if o.teacher_top_k and o.objective != "cross_entropy":  # of every sequence that is taken, were no text seen twice
        tokens = (o.steps * o.batch_size + (o.guard_sequences if o.guard_every else 0)) * o.seq_len
        stored, storing = tokens * entry_bytes(o.teacher_top_k), tokens * forward_flop(shape, o.seq_len)
        storing = storing / FORWARD / hardware.gpu.speed / ranks + stored / hardware.disk
        notes.append(f"up to {stored / 1e9:.1f} GB of full precision's predictions are stored meanwhile")
    loading = model_bytes(shape) / (ranks * LOAD)
    compiling = COMPILE + (MEETING if ranks > 1 else 0.0)
    return Part(
        START + loading + compiling + storing + o.steps * step + start + guard,
        gpu,
        ranks * PROCESS + pinned,
        stored + (o.keep_checkpoints + 3) * rotations,  # the final ones in fp32 and as R.bin, and what is being written
        notes,
        hardware.lacks(gpu, ranks * PROCESS + pinned),
    )


def fitted_start_seconds(shape: Shape, hardware: Hardware) -> float:
    """Fitting R1 before learning (`pipeline.range_init`): every layer is read by each rank, then products of [h, h]."""
    speed = hardware.gpu.speed
    computing = FIT_TOKENS * forward_flop(shape, FIT_TOKENS) / FORWARD / speed / hardware.gpus
    product = 2 * shape.hidden**3 / speed
    step = ITERATIONS * product / TF32 + 1.5 * product / FP32  # the last product and those of the rows in fp32
    return shape.layers * mean_layer_bytes(shape) / READ + computing + FIT_STEPS * step


def gptq_layer_seconds(shape: Shape, tokens: float, seq_len: int, speed: float, cd_passes: int = 0) -> dict[str, float]:
    """Parts of quantising one layer, the mean of all, on one GPU with `tokens` tokens of calibration text, seconds."""
    layers = shape.layers
    squares = shape.mean(lambda one: sum(count * rows * columns**2 for columns, rows, count, _ in one.products))
    cubes = shape.mean(lambda one: sum(count * columns**3 for columns, _, count, _ in one.products))
    experts = shape.mean(lambda one: sum(count * columns**0.75 for columns, _, count, _ in one.products if count > 1))
    return {
        "merge": 2 * shape.mean(lambda one: one.weights) * shape.hidden / MERGE / speed,
        "forward": tokens * forward_flop(shape, seq_len) / layers / FORWARD / speed,
        "hessian": tokens * hessian_flop(shape) / layers / HESSIAN / speed,
        "factor": cubes / FACTOR / speed,
        "solve": (1 + cd_passes) * squares / SOLVE / speed,
        "errors": squares / ERRORS / speed,
        "waiting": WAITING,
        "experts": EXPERT * experts / speed,  # beside their share of the parts above
    }


def gptq_bytes(shape: Shape, tokens: float) -> float:
    """Bytes of one GPU: states entering a layer and the inputs of down_proj, its Hessian and two of that size while it is
    factored, the largest weights in fp32 twice, two layers, and what the allocator and the libraries keep."""
    h, i = shape.hidden, max(shape.hidden, shape.intermediate, shape.dense_width)
    wide = 4 * (3 * i * i + 2 * 2 * i * h) + (8 * shape.weights if shape.experts else 0)  # merged in fp64
    return tokens * (h + i) * DTYPE.itemsize + wide + 2 * layer_bytes(shape, DTYPE) + 2 * GIB


def quantize(config: RunConfig, shape: Shape, hardware: Hardware) -> Part:
    """Rounding the weights: each GPU takes ranges of `layers_per_job` layers, or all share each layer where there is one range
    or `parallel` says so."""
    q, gpus, layers = config.quantize, hardware.gpus, shape.layers
    variants = 1 + len(q.baselines)
    tokens = q.n_sequences * q.seq_len
    gptq = q.method == "gptq"
    seconds = gptq_layer_seconds(shape, tokens if gptq else 0, q.seq_len, hardware.gpu.speed, q.cd_passes)
    reading = (
        mean_layer_bytes(shape) / READ
    )  # of the next layer meanwhile; its merge takes turns with the work on the GPU
    computing = seconds if gptq else {"merge": seconds["merge"]}
    alone = max(sum(computing.values()), reading)
    jobs = math.ceil(layers / q.layers_per_job) if q.layers_per_job else 1
    states = (jobs - 1) * tokens * shape.hidden * DTYPE.itemsize
    shares_layers = jobs == 1 or (gpus > 1 and q.parallel == "ranks")
    if not shares_layers:
        before = (jobs - 1) * q.layers_per_job * max(seconds["forward"] / gpus, reading)
        stored = states / max(1, jobs - 1)  # at one layer, of which the last are waited for
        rounds = math.ceil(jobs / gpus)  # after the first, states are read back
        before += stored / min(gpus, 4) / WRITER + (rounds - 1) * variants * stored / STATES
        total = START + OPENING + KERNELS + before + min(rounds * q.layers_per_job, layers) * alone * variants
        note = f"{alone:.2f} s a layer and GPU, {jobs} ranges of up to {q.layers_per_job} layers"
    else:
        whole = sum(computing.get(part, 0.0) for part in ("merge", "factor", "waiting", "experts"))
        each = max((sum(computing.values()) - whole) / gpus + whole, reading)
        total = START + OPENING + KERNELS + layers * each * variants
        note = f"{each:.2f} s a layer"
        note += f", on which {gpus} GPUs work together" if gpus > 1 else ""
    need = gptq_bytes(shape, tokens / gpus if shares_layers else tokens)
    host = gpus * (PROCESS + 2 * layer_bytes(shape, DTYPE))
    notes = [note]
    if q.tune_steps:
        # The whole model on each GPU, its weights and a byte for each code; forward, recomputation and backward of a step.
        read = tokens * shape.hidden * DTYPE.itemsize  # by the head, of every calibration token
        need = max(need, model_bytes(shape) * (1 + 1 / DTYPE.itemsize) + gptq_bytes(shape, 0) + read)
        host += gpus * read
        passes = 4 * q.tune_steps * TUNE_BATCH / gpus + q.n_sequences
        tuning = passes * q.seq_len * forward_flop(shape, q.seq_len) / FORWARD / hardware.gpu.speed
        total += tuning
        notes.append(f"{tuning:.0f} s of it tune scales, with the whole model on each GPU")
    return Part(
        total,
        need,
        host,
        variants * code_bytes(shape, config) + states,
        notes,
        hardware.lacks(need, host),
    )


def evaluate(config: RunConfig, shape: Shape, hardware: Hardware, tokens: int) -> Part:
    """Measuring; tokens: of all texts."""
    q, gpus, layers = config.quantize, hardware.gpus, shape.layers
    rotations = 1 + len(q.baselines)
    quantised = rotations if q.method != "none" and config.quant.w_bits < 16 else 0
    merged = rotations if config.evaluate.unquantized_weights or not quantised else 0
    computing = tokens * forward_flop(shape, config.evaluate.seq_len) / layers / FORWARD / hardware.gpu.speed / gpus
    codes = code_bytes(shape, config) / layers
    full = max(computing, mean_layer_bytes(shape) / READ)
    merging = gptq_layer_seconds(shape, 0, 1, hardware.gpu.speed)["merge"]
    seconds = layers * (full + merged * max(full, merging) + quantised * max(computing, codes / READ))
    seconds += (1 + merged + quantised) * vocab_bytes(shape) / READ
    seconds += (merged + quantised) * 4 * shape.vocab * shape.hidden**2 / MERGE / hardware.gpu.speed
    heads = 1 + merged + quantised
    notes = [f"{heads} models on {tokens} tokens"]
    states = tokens / gpus * shape.hidden * DTYPE.itemsize
    host, disk = float(gpus * PROCESS), 0.0
    if (
        config.evaluate.fidelity
    ):  # the pass of full precision is the teacher's, whose logits every other model needs too
        heads += merged + quantised
        if states <= STATES_SHARE * hardware.host / gpus:
            host += gpus * states
        else:
            disk = gpus * states
        notes.append("full precision is the teacher of the others")
    seconds += heads * tokens * 2 * shape.vocab * shape.hidden / FORWARD / hardware.gpu.speed / gpus
    ends = (2 if config.evaluate.fidelity else 1) * vocab_bytes(shape)  # the teacher's lm_head beside a model's own
    gpu = 4 * layer_bytes(shape, DTYPE) + ends + states + hardware.gpu.memory / 8
    return Part(START + OPENING + seconds + disk / hardware.disk, gpu, host, disk, notes, hardware.lacks(gpu, host))


def report(config: RunConfig, shape: Shape, hardware: Hardware) -> Part:
    """Drawing, by one process, which first measures activations without rotations and under each of them."""
    reading = mean_layer_bytes(shape) / READ
    merging = gptq_layer_seconds(shape, 0, 1, hardware.gpu.speed)["merge"]
    rotated = 1 + len(config.quantize.baselines)
    measured = bool(config.report.sequences) and not shape.experts
    each = (1 + rotated) * PROBES + reading + rotated * max(reading, merging)
    states = config.report.sequences * config.quantize.seq_len * shape.hidden * DTYPE.itemsize
    gpu = measured * (6 * layer_bytes(shape, DTYPE) + vocab_bytes(shape) / 2 + 2 * states)
    notes = [f"activations of {1 + rotated} models"] if measured else []
    return Part(START + OPENING + DRAWING + measured * shape.layers * each, gpu, PROCESS, notes=notes)


def export(config: RunConfig, shape: Shape, hardware: Hardware) -> Part:
    """Writing `export.target`, by one process."""
    codes = config.export.target in ("compressed-tensors", "executorch")
    size = code_bytes(shape, config) + vocab_bytes(shape) if codes else model_bytes(shape)
    merging = 0.0 if codes else shape.layers * gptq_layer_seconds(shape, 0, 1, hardware.gpu.speed)["merge"]
    host = PROCESS + 5 * config.export.shard_gb * 1e9
    last = (
        min(size, config.export.shard_gb * 1e9) / WRITER
    )  # of the files, which is written when there is nothing else to do
    seconds = START + OPENING + max(size / READ, merging, size / hardware.disk) + last
    return Part(seconds, 6 * layer_bytes(shape, DTYPE), min(host, hardware.host / 2), size, [config.export.target])


def parts(config: RunConfig, shape: Shape, hardware: Hardware, tokens: int) -> dict[str, Part]:
    """Every part of a run that the configuration asks for, in order."""
    planned = {}
    if config.optimize.steps:
        planned["optimize"] = optimize(config, shape, hardware)
    if config.quantize.method != "none" and config.quant.w_bits < 16:
        planned["quantize"] = quantize(config, shape, hardware)
    if config.evaluate.sources:
        planned["evaluate"] = evaluate(config, shape, hardware, tokens)
    planned["report"] = report(config, shape, hardware)
    if config.export.target != "none":
        planned["export"] = export(config, shape, hardware)
    return planned


def run_seconds(planned: dict[str, Part]) -> float:
    """Of all parts, one after the other by `run`, which lets those after the first import ahead of their turn."""
    return sum(part.seconds for part in planned.values()) - IMPORTS * max(0, len(planned) - 1)
