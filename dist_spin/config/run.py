"""The run's settings: one dataclass per component, checked as soon as they are built, and never changed.

`dist-spin VERB --help` prints their docstrings; `dist_spin.config.loader` reads them from files and the command line. What is
built without the loader still has its presets to be resolved: `dist_spin.config.presets`.
"""

import os
from dataclasses import dataclass, field, replace

from dist_spin.config.checks import check_path, check_text, require
from dist_spin.config.compare import CompareConfig
from dist_spin.config.distributed import DistributedConfig
from dist_spin.config.evaluate import EvaluateConfig
from dist_spin.config.export import ExportConfig
from dist_spin.config.methods import MethodsConfig
from dist_spin.config.model import ModelConfig
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.quant import QuantConfig
from dist_spin.config.quantize import QuantizeConfig
from dist_spin.config.report import ReportConfig
from dist_spin.config.rotation import RotationConfig

LOCATION = ("name", "output_dir", "base_dir")  # the settings in no group: where a run lies, not what it does
MAX_NAME = 200  # bytes; files and temporary files put up to 55 more around it


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run."""

    name: str = "run"
    """Name of the run: its directory under output_dir."""
    output_dir: str = "runs"
    """Directory that holds the runs."""
    base_dir: str | None = None
    """Directory that relative paths of settings start from; null: the working directory. A run notes it in its config.yaml, which
    then holds wherever it is read."""
    model: ModelConfig
    rotation: RotationConfig = field(default_factory=RotationConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        plain = "use a plain directory name; output_dir says where it lies"
        require(self.name not in ("", ".", "..") and "/" not in self.name, "name", self.name, plain)
        check_text("name", self.name)
        option = "begin it with another character, since it looks like an option"
        require(not self.name.startswith("-"), "name", self.name, option)
        short = f"use at most {MAX_NAME} bytes: files are named after it"
        require(len(self.name.encode()) <= MAX_NAME, "name", self.name, short)
        check_path("output_dir", self.output_dir)
        check_path("base_dir", self.base_dir)

    def path(self, text: str) -> str:
        """A path of these settings as the operating system takes it: `~` expanded, and from `base_dir` where it is relative."""
        expanded = os.path.expanduser(text)
        here = self.base_dir is None or os.path.abspath(self.base_dir) == os.getcwd()
        return expanded if here or os.path.isabs(expanded) else os.path.join(str(self.base_dir), expanded)

    def source(self, text: str) -> str:
        """A text source of these settings with its paths as `path` gives them."""
        kind, _, rest = text.partition(":")
        if kind == "hf" and rest.startswith((".", "/", "~")):  # a directory; others may be the hub's
            name, colon, more = rest.partition(":")
            return f"hf:{self.path(name)}{colon}{more}"
        if kind not in ("text", "tokens"):
            return text
        paths, mark, _ = rest.partition("#all") if rest.endswith("#all") else (rest, "", "")
        parts = paths.split(",") if kind == "text" else [paths]
        return f"{kind}:{','.join(map(self.path, parts))}{mark}"

    @property
    def model_path(self) -> str:
        """`model.path` as `path` gives it where it is one; hub ids and packages as they are."""
        path = self.path(self.model.path)
        is_path = self.model.path.startswith((".", "/", "~")) or path.endswith(".gguf") or os.path.isdir(path)
        return path if is_path and not self.model.path.startswith("package:") else self.model.path

    def with_base_dir(self) -> "RunConfig":
        """The same with `base_dir` as an absolute path, from the working directory."""
        return replace(self, base_dir=os.path.abspath(os.path.expanduser(self.base_dir or ".")))


def reading_stages(config: RunConfig) -> list[str]:
    """The stages that pass text of their own `seq_len` through the model."""
    reads = {
        "optimize": config.optimize.steps > 0,
        "quantize": config.quantize.method != "none" and config.quant.w_bits < 16,
        "evaluate": bool(config.evaluate.sources),
    }
    return [stage for stage, does in reads.items() if does]
