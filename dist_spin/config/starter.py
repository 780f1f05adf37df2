"""`dist-spin init`: a first configuration, made of a few answers or copied from the examples, with a comment at every setting.

dist-spin init                                          asks for what is not given
dist-spin init --model meta-llama/Llama-3.1-8B --gpus 8 --target compressed-tensors
dist-spin init --example quickstart
dist-spin init --example slurm                          the sbatch scripts, into a folder
"""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dist_spin.config.checks import MAX_LOCAL_PROCESSES, one_line
from dist_spin.config.examples import bundled
from dist_spin.config.examples import example as packaged_example
from dist_spin.config.export import FORMATS
from dist_spin.config.loader import load_config
from dist_spin.config.suggestions import closest, did_you_mean
from dist_spin.config.yaml_text import YAML_ENDINGS, quoted
from dist_spin.errors import UserError

T = TypeVar("T")

TARGETS = ("none", *FORMATS)
SLURM = "slurm"  # the example that is a folder of scripts
GPUS = Path("/proc/driver/nvidia/gpus")  # one folder for each, by NVIDIA's driver

# What each target takes, from the limits of its runtimes (`dist_spin.pipeline.export_limits`).
QUANTISERS = {
    "none": "W4A4KV4, the published setting: 4 bits for all of these",
    "hf": "W4A4KV4 in `dist_spin.load`; the files themselves hold 16-bit weights",
    "compressed-tensors": "W4A16, which vLLM runs on every GPU; 8 activation bits need kernels for int8",
    "gguf": "measured here at W4A16; the files hold 16-bit weights, which llama.cpp's own llama-quantize rounds",
    "executorch": "int4 weights in groups and int8 activations, the only ones its Llama runs",
}
NO_ONLINE = ("hf", "compressed-tensors", "gguf", "executorch")  # exported without Hadamards at run time


def init(
    file: Path | None = None,
    *,
    model: str | None = None,
    gpus: int | None = None,
    target: str | None = None,
    example: str | None = None,
    force: bool = False,
) -> str:
    """Write a configuration; what is not given is asked for where somebody sits at the terminal.

    Args:
        file: where to; by default the run's name and .yaml, in the working directory.
        model: a directory, hub id, .gguf or package:NAME. gpus: of one machine, 0 for none. target: one of `TARGETS`.
        example: the name of a packaged example, instead of these three; "slurm" is a folder with the sbatch scripts.
        force: replace a file that is there.

    Returns:
        What to tell the user: where the file is and how to go on.

    Raises:
        UserError: something is missing or wrong, or the file is there already; nothing is written.
    """
    if example is not None:
        if (model, gpus, target) != (None, None, None):
            raise UserError("--example is a whole configuration", "leave --model, --gpus and --target out")
        if example == SLURM:
            if file is not None:
                raise UserError("--example slurm writes a folder of that name", f"leave {one_line(str(file))} out")
            return _write_scripts(Path(SLURM), force=force)
        return _write(
            file or Path(f"{example.rpartition('/')[2].removesuffix('.yaml')}.yaml"),
            packaged_example(example),
            force=force,
        )
    if model is None:
        model = _ask("Model (hub id such as meta-llama/Llama-3.1-8B, directory or .gguf file)", "", _checked_model)
    if gpus is None:
        gpus = _ask("GPUs of this machine to use; 0 computes on the CPU", str(count_gpus()), _checked_gpus)
    if target is None:
        target = _ask(f"Format to export to: {', '.join(TARGETS)}", "none", _checked_target)
    model, gpus, target = _checked_model(model), _checked_gpus(str(gpus)), _checked_target(target)
    name = run_name(model, target)
    return _write(file or Path(f"{name}.yaml"), starter_yaml(name, model, gpus, target), force=force)


def count_gpus() -> int:
    """NVIDIA GPUs of this machine; 0 without the driver. Asked of the kernel, since importing torch takes seconds."""
    return len(list(GPUS.iterdir())) if GPUS.is_dir() else 0


def run_name(model: str, target: str) -> str:
    """A name for the run, such as llama-3.1-8b-compressed-tensors: also of its directory and file."""
    last = model.rstrip("/").rpartition("/")[2].rpartition(":")[2].removesuffix(".gguf")
    plain = re.sub(r"[^a-z0-9.]+", "-", last.lower()).strip("-.") or "run"
    return f"{plain[:100]}-{'w4a4kv4' if target == 'none' else target}"


def starter_yaml(name: str, model: str, gpus: int, target: str) -> str:
    """The text of a commented configuration, by the recipe of accurate.yaml; on the CPU (gpus 0) few steps on short texts."""
    bits = {"w_bits": 4, "a_bits": 4, "k_bits": 4, "v_bits": 4}
    if target in ("compressed-tensors", "gguf", "executorch"):
        bits |= {"a_bits": 8 if target == "executorch" else 16, "k_bits": 16, "v_bits": 16}
    small = gpus == 0
    source, length, steps, batch, sequences = ("pydoc", 512, 20, 2, 12) if small else ("wikitext2", 2048, 200, 8, 128)
    text = "Python's own documentation: no download" if small else "WikiText-2, from the hub or its cache"
    lines = [
        f"# {name}: learn rotations, quantise, measure. The same command continues a run that was stopped.",
        "#",
        f"#   dist-spin run {name}.yaml",
        *([] if small else [f"#   dist-spin submit {name}.yaml --slurm partition=gpu  # the same on a Slurm cluster"]),
        "#   dist-spin help quant.  # what else can be set",
        "",
        f"name: {quoted(name)}  # results appear in runs/{name}/",
        "",
        "model:",
        f"  path: {quoted(model)}",
        "",
    ]
    # With more bits, scales that were learned for 4 cost accuracy: the rotations alone are learned then.
    fitted = bits["a_bits"] == 4
    if fitted or target in NO_ONLINE:
        lines.append("rotation:")
        if fitted:
            lines.append("  init: range  # start from rotations fitted to activations, so that these have small ranges")
        if target in NO_ONLINE:
            lines.append("  online: false  # nothing but the weights is rotated, so that every runtime serves it")
        lines.append("")
    lines += [f"quant:  # {QUANTISERS[target]}"]
    meanings = {"w": "weights", "a": "activations: the inputs of the linear layers", "k": "keys", "v": "values"}
    for setting, width in bits.items():
        off = " (16 = left as they are)" if width == 16 else ""
        lines.append(f"  {setting}: {width}  # {meanings[setting[0]]}{off}")
    if target == "executorch":
        lines += ["  w_group_size: 32  # input channels that share a scale", "  embedding_bits: 8", "  head_bits: 8"]
    lines += [
        "",
        "optimize:  # 1. learn the rotations",
        f"  source: {source}  # {text}",
        f"  seq_len: {length}  # tokens per sequence",
        f"  steps: {steps}",
        f"  batch_size: {batch}  # sequences per step, over all processes together",
        "  optimizer: cayley_adam",
        "  lr: 0.004  # of the rotations, radians per step",
        f"  warmup_steps: {3 if small else 5}",
    ]
    if fitted:
        lines += [
            "  scales: true  # learn scales of channels too, which merge into the weights,",
            f"  scale_lr: {0.05 if small else 0.03}",
            "  clips: true  # and which part of its range each quantiser keeps",
            f"  clip_lr: {0.15 if small else 0.05}",
        ]
    if not small:
        if fitted:
            lines += [
                "  objective: kl  # learn from what the original predicts, to stay close to it,",
                "  teacher_top_k: 256  # stored once, for each token its most probable next ones",
            ]
        lines.append("  guard_every: 10  # keep the best state on held-out text")
    if bits["a_bits"] == 16:
        lines.append("  a_bits: 4  # 16-bit activations round nothing, so learn from what 4 bits would round")
    lines += [
        "",
        "quantize:  # 2. round the weights with GPTQ",
        f"  source: {source}",
        f"  seq_len: {length}",
        f"  n_sequences: {sequences}  # sequences that GPTQ looks at",
        "  clip_norm: 2  # clip the ranges of weights by least squares",
        f"  cd_passes: {2 if small else 4}  # go over GPTQ's codes so often again, each time lowering the error",
        "  baselines: [hadamard]  # also with random rotations, for comparison; none: without any",
        "",
        "evaluate:  # 3. measure perplexity on text that neither step has seen",
        f"  sources: [{source}]",
        f"  seq_len: {length}",
        "",
    ]
    if target != "none":
        lines += [
            "export:  # 4. dist-spin export runs/" + name,
            f"  target: {target}  # what it has no place for is refused when the run starts",
        ]
        if target == "gguf":
            lines.append("  gguf_converter: download  # llama.cpp's converter, by pip; or the path of yours")
        lines.append("")
    lines += ["distributed:", f"  nproc: {gpus or 1}  # processes on this machine: one per GPU"]
    if small:
        lines.append("  device: cpu")
    return "\n".join(lines) + "\n"


def _write(file: Path, text: str, *, force: bool) -> str:
    path, printed = file.expanduser(), one_line(str(file))
    if path.suffix not in YAML_ENDINGS:
        raise UserError(f"{printed} is no name for a configuration", "give a FILE.yaml")
    try:
        with path.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise UserError(f"{printed} is there already", "give another FILE.yaml, or --force to replace it") from error
    except OSError as error:
        raise UserError(
            f"cannot write {printed}: {error.strerror}", "give a FILE.yaml in a directory of yours"
        ) from error
    config, verb = load_config(str(path), []), "compare" if "\ncompare:" in text else "run"
    command = f"dist-spin {verb} {shlex.quote(printed)}"
    return f"wrote {printed}; next: {command}, which writes to {config.output_dir}/{config.name}"


def _write_scripts(folder: Path, *, force: bool) -> str:
    try:
        folder.mkdir(exist_ok=force)
        for script in bundled(SLURM).iterdir():
            copy = folder / script.name
            copy.write_bytes(script.read_bytes())
            if copy.suffix == ".sh":
                copy.chmod(0o755)
    except FileExistsError as error:
        raise UserError(f"{folder}/ is there already", "move it away, or --force to replace its scripts") from error
    except OSError as error:
        raise UserError(f"cannot write {folder}/: {error.strerror}", "go to a directory of yours") from error
    return f"wrote {folder}/; next: the settings at the top of {folder}/optimize.sbatch, then {folder}/pipeline.sh CONFIG.yaml"


def _ask(question: str, default: str, checked: Callable[[str], T]) -> T:
    """The answer to a question at the terminal, asked again until it can be used."""
    if not sys.stdin.isatty():
        raise UserError(
            "init is not told enough, and there is no terminal to ask at",
            "give --model, --gpus and --target, or --example quickstart",
        )
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError as error:
            raise UserError("init was not answered", "give --model, --gpus and --target") from error
        try:
            return checked(answer)
        except UserError as error:
            print(error, file=sys.stderr)


def _checked_model(text: str) -> str:
    load_config(None, [f"model.path={text}"])
    return text


def _checked_gpus(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_LOCAL_PROCESSES:
        raise UserError(f"{text!r} is no number of GPUs", f"give 0 to {MAX_LOCAL_PROCESSES}")
    return int(text)


def _checked_target(text: str) -> str:
    if text not in TARGETS:
        raise UserError(
            f"{text!r} is no export format", f"{did_you_mean(closest(text, TARGETS))}use one of {', '.join(TARGETS)}"
        )
    return text
