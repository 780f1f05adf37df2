"""Help: every setting with its meaning and default, whole or by group."""

import dataclasses
import re

import pytest

from dist_spin.config import checks as module
from dist_spin.config.compare import CompareConfig
from dist_spin.config.distributed import DistributedConfig
from dist_spin.config.evaluate import EvaluateConfig
from dist_spin.config.export import ExportConfig
from dist_spin.config.help import config_help
from dist_spin.config.methods import MethodsConfig
from dist_spin.config.model import ModelConfig
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.quant import QuantConfig
from dist_spin.config.quantize import QuantizeConfig
from dist_spin.config.report import ReportConfig
from dist_spin.config.rotation import RotationConfig
from dist_spin.config.run import RunConfig

LEAVES = (
    ModelConfig,
    RotationConfig,
    QuantConfig,
    OptimizeConfig,
    QuantizeConfig,
    MethodsConfig,
    EvaluateConfig,
    ExportConfig,
    CompareConfig,
    ReportConfig,
    DistributedConfig,
)


def test_help_explains_every_setting_with_its_default() -> None:
    text = config_help()
    starts = [f"{leaf.__name__.removesuffix('Config').lower()} (" for leaf in LEAVES]
    assert [text.count(f"\n{start}") for start in starts] == [1] * len(LEAVES)
    # An entry is one line `  key=TYPE …` and the more deeply indented lines below it.
    found = re.findall(r"^  ([\w.]+)=(\S+(?: .*)?\n(?: {4,}.*\n)*)", text, re.MULTILINE)
    entries = {key: " ".join(rest.split()) for key, rest in found}
    wanted = [
        f"{leaf.__name__.removesuffix('Config').lower()}.{i.name}" for leaf in LEAVES for i in dataclasses.fields(leaf)
    ]
    assert list(entries) == ["name", "output_dir", "base_dir", *wanted]
    for key, entry in entries.items():
        assert re.fullmatch(r"\S+ .{15,}\. \((required, .*|.*default: .*)\)", entry), (key, entry)
    assert "--" not in text
    assert "CONFIG" not in text.replace("[:CONFIG]", "")


def test_help_of_some_groups_is_that_part_of_the_whole() -> None:
    sections = config_help().strip().split("\n\n")
    wanted = [sections[0], *(s for s in sections if s.startswith(("quant (", "export (")))]
    assert config_help({"export", "quant"}) == "\n\n".join(wanted) + "\n"
    assert config_help([]) == sections[0] + "\n"
    assert config_help([item.name for item in dataclasses.fields(RunConfig)]) == config_help()
    with pytest.raises(ValueError, match="quants"):
        config_help(["quants"])


def test_named_sources_are_the_ones_that_help_mentions() -> None:
    assert all(f"{name}," in config_help() for name in module.NAMED_SOURCES)
