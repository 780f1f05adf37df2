"""The options of `dist-spin bench`: what each of its commands times and takes. No torch here, so that help answers at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

from dist_spin.config.checks import one_line
from dist_spin.errors import UserError
from dist_spin.model.checkpoint_headers import check_config

BENCHES = {
    "optimize": "seconds per step of rotation learning, on random weights of a real shape",
    "quantize": "seconds per decoder layer of GPTQ",
    "inference": "what rotation costs and fewer bits gain on low-bit kernels",
    "pipeline": "a whole run from a checkpoint on disk, every part in processes of its own: the benchmark of record",
    "scaling": "step times on several numbers of GPUs, beside a formula that predicts others",
}
PARTS = ("optimize", "quantize", "evaluate", "compressed-tensors", "hf")  # of `bench pipeline`, in their order
KERNELS = (
    *("bf16", "fp8", "int8", "int4", "w4a8"),
    *("humming-w4a16", "humming-w4a8", "humming-w4afp8", "humming-w4a4"),
    *("humming-nvfp4a16", "humming-mxfp4a16", "humming-mxfp4afp8"),
)
SHAPES = {  # hidden size, intermediate size, heads, key and value heads
    "tiny": (64, 96, 4, 2),
    "135m": (576, 1536, 9, 3),
    "1b": (2048, 8192, 32, 8),
    "8b": (4096, 14336, 32, 8),
    "70b": (8192, 28672, 64, 8),
}
EXPERT_SHAPES = {  # hidden size, one expert's intermediate size, heads, key and value heads, experts, of which a token takes
    "tiny-moe": (64, 96, 4, 2, 8, 2),
    "30b-a3b": (2048, 768, 32, 4, 128, 8),
    "235b-a22b": (4096, 1536, 64, 4, 128, 8),
}


def shape(text: str) -> Path:
    """A directory with a config.json that can be used.

    Raises:
        UserError: it cannot.
    """
    directory = Path(text)
    try:
        check_config(directory, dummy=True)
    except UserError as error:
        raise UserError(
            one_line(error.problem), "give a directory like configs/shapes/llama-3-8b", shared=True
        ) from error
    return directory


def numbers(text: str) -> list[int]:
    """'8,16' as [8, 16]."""
    return [int(part) for part in text.split(",")]


def parts(text: str) -> list[str]:
    """'optimize,quantize' as a list of PARTS."""
    chosen = text.split(",")
    if not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"parts are some of {', '.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def add_arguments(bench: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of `dist-spin bench BENCH`."""
    options: dict[str, Callable[[argparse.ArgumentParser], None]] = {
        "optimize": _optimize,
        "quantize": _quantize,
        "inference": _inference,
        "pipeline": _pipeline,
        "scaling": _scaling,
    }
    options[bench](parser)


def _optimize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shape", metavar="SHAPE", type=shape, help="directory with a config.json, such as configs/shapes/llama-3-8b"
    )
    meaning = "timed steps, after two that are not (default: %(default)s)"
    parser.add_argument("--steps", metavar="N", type=int, default=5, help=meaning)
    meaning = "numbers of decoder layers, each timed; 0: as in config.json"
    parser.add_argument("--layers", metavar="8,16,...", type=numbers, default=[0], help=meaning)
    meaning = "numbers of sequences per step, each timed; 0: optimize.batch_size"
    parser.add_argument("--sequences", metavar="1,2,...", type=numbers, default=[0], help=meaning)
    meaning = "also time the published formulation, which rotates weights in every forward pass; for one sequence on one device"
    parser.add_argument("--baseline", choices=["weight-side"], help=meaning)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")


def _quantize(parser: argparse.ArgumentParser) -> None:
    meaning = "size of the model whose decoder layer is timed (default: %(default)s)"
    parser.add_argument("--shape", choices=SHAPES | EXPERT_SHAPES, default="8b", help=meaning)
    meaning = "calibration sequences (default: %(default)s)"
    parser.add_argument("--sequences", metavar="N", type=int, default=128, help=meaning)
    meaning = "tokens of a sequence (default: %(default)s)"
    parser.add_argument("--seq-len", metavar="N", type=int, default=2048, help=meaning)
    meaning = "input channels that share a weight scale; 0 (default): one scale per output channel"
    parser.add_argument("--group-size", metavar="N", type=int, default=0, help=meaning)
    meaning = "take weight scales from the largest weight, without a search for the best clipping"
    parser.add_argument("--no-mse-clip", action="store_true", help=meaning)
    meaning = "passes of coordinate descent over GPTQ's codes, timed with GPTQ (default: %(default)s)"
    parser.add_argument("--cd-passes", metavar="N", type=int, default=0, help=meaning)
    # The option's name of earlier versions.
    parser.add_argument("--sweeps", dest="cd_passes", type=int, help=argparse.SUPPRESS)
    meaning = "timed layers, after one that is not timed (default: %(default)s)"
    parser.add_argument("--repeats", metavar="N", type=int, default=2, help=meaning)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    meaning = "also time a plain GPTQ, one column at a time, on the same matrices"
    parser.add_argument("--baseline", action="store_true", help=meaning)
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the figures as JSON")


def _inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shape", metavar="SHAPE", type=shape, help="directory with a config.json, such as configs/shapes/llama-3-8b"
    )
    meaning = f"some of {', '.join(KERNELS)} (default: all); bf16 is always measured"
    parser.add_argument("--kernels", metavar="A,B,...", default=",".join(KERNELS), help=meaning)
    meaning = "numbers of sequences decoded at once (default: %(default)s)"
    parser.add_argument("--batches", metavar="1,4,...", default="1,4,16,64", help=meaning)
    meaning = "tokens that a decoded token attends to, itself included (default: %(default)s)"
    parser.add_argument("--context", metavar="N", type=int, default=1024, help=meaning)
    meaning = "tokens of a sequence in prefill; 0: no prefill (default: %(default)s)"
    parser.add_argument("--prefill", metavar="N", type=int, default=512, help=meaning)
    meaning = (
        "instead of R3 and a whole R4: R4 alone, in blocks of N channels (a power of two), as a product of its own and within "
        "kernels that can; 0 (default): R3 and R4"
    )
    parser.add_argument("--r4-block", metavar="N", type=int, default=0, help=meaning)
    meaning = "decoder layers; 0 (default): all of the model on a GPU, 1 on a CPU"
    parser.add_argument("--layers", metavar="N", type=int, default=0, help=meaning)
    meaning = "seconds that one pass may take; larger batches are left out (default: %(default)s)"
    parser.add_argument("--limit", metavar="S", type=float, default=2.0, help=meaning)
    meaning = "seconds for which one measurement is repeated, at least once (default: %(default)s)"
    parser.add_argument("--seconds", metavar="S", type=float, default=0.1, help=meaning)
    meaning = "seconds after which no further measurement begins; 0 (default): all are made"
    parser.add_argument("--budget", metavar="S", type=float, default=0.0, help=meaning)
    meaning = "CPU threads; 0 (default): torch's own number"
    parser.add_argument("--threads", metavar="N", type=int, default=0, help=meaning)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    meaning = "torch.compile; auto: on a GPU"
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=meaning)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")


def _pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shape", metavar="SHAPE", type=shape, help="directory with a config.json, such as configs/shapes/llama-3-70b"
    )
    meaning = "where the checkpoint (once for each number of layers) and the run are written, on the disk to be timed"
    parser.add_argument("--directory", metavar="DIR", type=Path, default=Path("bench-pipeline"), help=meaning)
    parser.add_argument(
        "--layers", metavar="N", type=int, default=0, help="decoder layers; 0 (default): as in config.json"
    )
    meaning = f"some of {', '.join(PARTS)} (default: all); each needs what those before it have made"
    parser.add_argument("--stages", dest="parts", metavar="A,B,...", type=parts, default=list(PARTS), help=meaning)
    meaning = "GPUs to use, one process for each; 0 (default): all of this machine"
    parser.add_argument("--gpus", metavar="N", type=int, default=0, help=meaning)
    parser.add_argument("--steps", metavar="N", type=int, default=5, help="learning steps (default: %(default)s)")
    meaning = "quantize by jobs of their own (--cluster local) instead of ranks of one process group"
    parser.add_argument("--fan-out", action="store_true", help=meaning)
    meaning = "whether files are in the page cache when a part starts (warm: as the part before left them; default)"
    parser.add_argument("--cache", choices=("warm", "cold", "both"), default="warm", help=meaning)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")


def _scaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="what `bench optimize --json` wrote")
    meaning = "directory with the config.json of the model that was timed (default: %(default)s)"
    parser.add_argument("--shape", metavar="DIR", type=shape, default=Path("configs/shapes/llama-3-70b"), help=meaning)
    meaning = "numbers of GPUs to predict for, with all layers of the shape"
    parser.add_argument("--predict", metavar="4,8,...", type=numbers, default=[], help=meaning)
    meaning = "numbers of sequences per step to predict for (default: those measured)"
    parser.add_argument("--sequences", metavar="8,16,...", type=numbers, default=[], help=meaning)
    meaning = "numbers of ranks that share one copy of the weights, to predict for; 0 (default): all"
    parser.add_argument("--shard-ranks", metavar="2,4,...", type=numbers, default=[0], help=meaning)
    meaning = "GB/s that one GPU receives in an all-gather (default: %(default)s, NVLink of an HGX H200)"
    parser.add_argument("--link-gb-s", metavar="X", type=float, default=375.0, help=meaning)
    meaning = "GB/s read plus written by copies within a GPU (default: %(default)s)"
    parser.add_argument("--copy-gb-s", metavar="X", type=float, default=4000.0, help=meaning)
    meaning = (
        "share of an all-gather's time that a step gets longer by although compute overlaps it (0: none, 1: nothing overlaps; "
        "default: %(default)s)"
    )
    parser.add_argument("--contention", metavar="X", type=float, default=0.3, help=meaning)
    meaning = "GiB of memory of one GPU to predict for (default: %(default)s)"
    parser.add_argument("--device-gib", metavar="X", type=float, default=139.0, help=meaning)
    meaning = "what `bench quantize --out` wrote: adds the seconds of a whole run"
    parser.add_argument("--quantize", metavar="FILE", type=Path, help=meaning)
    meaning = "learning steps of a whole run (default: %(default)s)"
    parser.add_argument("--steps", metavar="N", type=int, default=100, help=meaning)
    meaning = "layers that one GPTQ job of a whole run quantises (default: %(default)s)"
    parser.add_argument("--layers-per-job", metavar="N", type=int, default=10, help=meaning)
    meaning = "GB/s at which hidden states and layers are written (default: %(default)s)"
    parser.add_argument("--disk-gb-s", metavar="X", type=float, default=1.0, help=meaning)
    meaning = "seconds before a process starts its work: imports, CUDA, NCCL (default: %(default)s)"
    parser.add_argument("--start-s", metavar="S", type=float, default=20.0, help=meaning)
