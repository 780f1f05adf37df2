"""Settings: precedence, typing by setting, one-line errors with a remedy, round trip, help, and the shipped YAML."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dist_spin.config.evaluate import EvaluateConfig
from dist_spin.config.loader import dump_config, load_config
from dist_spin.config.model import ModelConfig
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.presets import resolve_presets
from dist_spin.config.quant import QuantConfig
from dist_spin.config.quantize import QuantizeConfig
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
MODEL = "model.path=some/model"


def error_of(path: Path | None, *overrides: str) -> str:
    """The one line a user would read."""
    with pytest.raises(UserError) as caught:
        load_config(None if path is None else str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy, message
    return message


@pytest.fixture
def write(tmp_path: Path) -> typing.Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_defaults_file_and_command_line_in_that_order(write: typing.Callable[[str], Path]) -> None:
    path = write("model: {path: from/file, dtype: float32}\noptimize:\n  steps: 7\n  lr: 0.5\n")
    config = load_config(str(path), ["optimize.steps=9"])
    assert config.model == ModelConfig("from/file", dtype="float32")
    assert (config.optimize.steps, config.optimize.lr) == (9, 0.5)
    assert config.optimize.batch_size == OptimizeConfig().batch_size
    assert config.quant == QuantConfig(arithmetic="fp32")  # what `auto` means here


def test_arithmetic_follows_the_target_and_stays_with_a_run(write: typing.Callable[[str], Path]) -> None:
    target = "export.target=compressed-tensors"
    made = load_config(None, [MODEL, target])
    assert made.quant.arithmetic == "compressed-tensors"
    assert load_config(None, [MODEL, target, "quant.arithmetic=fp32"]).quant.arithmetic == "fp32"
    assert load_config(str(write(dump_config(made))), ["export.target=hf"]).quant == made.quant
    assert load_config(str(write(dump_config(load_config(None, [MODEL])))), [target]).quant.arithmetic == "fp32"


def test_three_spellings_of_an_override_and_the_last_one_wins() -> None:
    overrides = [MODEL, "--optimize.steps=3", "--optimize.lr", "-0", "--optimize.lr", "2", "optimize.steps=4"]
    config = load_config(None, overrides)
    assert (config.optimize.steps, config.optimize.lr) == (4, 2.0)


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("optimize.lr", "1e-4", 1e-4),  # text to a YAML 1.1 parser
        ("optimize.lr", "2", 2.0),
        ("optimize.compile", "off", "off"),  # False to a YAML 1.1 parser
        ("quantize.method", "none", "none"),
        ("quantize.baselines", "[none, hadamard]", ["none", "hadamard"]),
        ("evaluate.sources", "[pydoc, 'text:a,b']", ["pydoc", "text:a,b"]),
        ("evaluate.sources", "pydoc", ["pydoc"]),  # one word where a list is wanted
        ("evaluate.sources", "text:a,b", ["text:a,b"]),
        ("quantize.baselines", "none, hadamard", ["none", "hadamard"]),
        ("rotation.online", "false", False),
        ("rotation.online", "no", False),
        ("model.revision", "null", None),
        ("model.revision", "None", None),
        ("model.revision", "1e5", "1e5"),
        ("rotation.load", "", None),
        ("name", "12", "12"),
        ("name", "null", "null"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_setting(
    from_file: bool, key: str, text: str, wanted: object, write: typing.Callable[[str], Path]
) -> None:
    path = str(write(f"{key}: {text}")) if from_file else None
    value: object = load_config(path, [MODEL] if from_file else [MODEL, f"{key}={text}"])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == wanted
    assert type(value) is type(wanted)


def test_a_group_with_all_lines_commented_out_keeps_its_defaults(write: typing.Callable[[str], Path]) -> None:
    assert load_config(str(write("optimize:\n  # steps: 3\n")), [MODEL]).optimize == OptimizeConfig()


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("optimize.step", "did you mean optimize.steps?"),
        ("steps", "did you mean optimize.steps?"),
        ("quant.percdamp", "did you mean quantize.percdamp?"),
        ("w_bits", "did you mean quant.w_bits or optimize.w_bits?"),
        ("optimize.steps.more", "did you mean optimize.steps?"),
        ("zzzzzzzz", "--help"),
    ],
)
def test_unknown_keys_fail_with_a_suggestion(key: str, remedy: str, write: typing.Callable[[str], Path]) -> None:
    message = error_of(None, MODEL, f"{key}=1")
    assert f"unknown setting {key!r} in the command line" in message
    assert remedy in message
    path = write(f"{key}: 1")
    assert f"unknown setting {key!r} in {path}" in error_of(path, MODEL)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimize.steps=many", ["optimize.steps is 'many' in the command line", "a whole number"]),
        ("optimize.steps=1.5", ["optimize.steps is '1.5'", "a whole number"]),
        ("optimize.lr=nan", ["optimize.lr is 'nan'", "a number"]),
        ("rotation.online=maybe", ["rotation.online is 'maybe'", "true or false"]),
        ("model.dtype=int4", ["model.dtype is 'int4'", "one of bfloat16, float32, float64, float16"]),
        ("evaluate.sources={a: b}", ["evaluate.sources is '{a: b}'", "a list such as [a, b], each text"]),
        ("quantize.baselines=[none,learned]", ["quantize.baselines is", "each one of none, hadamard, orthogonal"]),
        ("optimize=5", ["optimize is '5' in the command line, but it is a group", "set optimize.source"]),
        ("optimize.steps", ["'optimize.steps' on the command line sets nothing", "key=value"]),
        ("--optimize.steps", ["'--optimize.steps' on the command line sets nothing", "key=value"]),
    ],
)
def test_wrong_types_name_the_key_the_value_and_what_it_takes(override: str, parts: list[str]) -> None:
    message = error_of(None, MODEL, override)
    for part in parts:
        assert part in message


def test_a_wrong_type_in_the_file_names_the_file(write: typing.Callable[[str], Path]) -> None:
    path = write("optimize: {steps: many}")
    assert f"optimize.steps is 'many' in {path}; it takes a whole number" in error_of(path, MODEL)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optimize: {steps: 3", "line 1:"),
        ("name: a\n\tsteps: 3", "line 2:"),
        ("name: a\nname: b", "set twice"),
        ("optimize: {lr: 1, lr: 2}", "set twice"),
        ("name: *missing", "line 1:"),
        ("- a\n- b", "holds no settings"),
        ("just words", "holds no settings"),
        ("a\x00b", "special characters are not allowed"),
        ("? [a]\n: b", "line 1:"),
    ],
)
def test_bad_yaml_says_which_file_and_where(text: str, part: str, write: typing.Callable[[str], Path]) -> None:
    path = write(text)
    message = error_of(path, MODEL)
    assert str(path) in message
    assert part in message


def test_yaml_cannot_build_objects(write: typing.Callable[[str], Path], tmp_path: Path) -> None:
    path = write(f"name: !!python/object/apply:os.mkdir [{tmp_path}/made]")
    assert "name is" in error_of(path, MODEL)
    assert not (tmp_path / "made").exists()


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "missing.yaml")
    assert "Is a directory" in error_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert "not UTF-8" in error_of(tmp_path / "latin.yaml")


def test_the_model_must_be_named() -> None:
    assert error_of(None).startswith("model.path is not set; add model.path=")
    assert "model.path is ''" in error_of(None, "model.path=")


@pytest.mark.parametrize(
    "override",
    [
        "name=a/b",
        "name=..",
        "rotation.seed=-1",
        "rotation.r4_block=-128",
        "quant.w_bits=17",
        "quant.a_bits=1",
        "quant.k_bits=9",
        "quant.v_bits=0",
        "quant.a_clip_ratio=0",
        "quant.k_clip_ratio=1.01",
        "quant.v_clip_ratio=-0.5",
        "quant.w_group_size=-1",
        "quant.k_group_size=-1",
        "quant.v_group_size=-64",
        "optimize.source=wikitext",
        "optimize.seq_len=1",
        "optimize.steps=-1",
        "optimize.batch_size=0",
        "optimize.micro_batch_size=9",
        "optimize.micro_batch_size=-1",
        "optimize.warmup_steps=100",
        "optimize.warmup_steps=-1",
        "optimize.lr=0",
        "optimize.lr=.inf",
        "optimize.momentum=1",
        "optimize.max_grad_norm=-1",
        "optimize.reproject_every=0",
        "optimize.keep_checkpoints=0",
        "optimize.seed=-2",
        "quantize.source=tokens:rows.txt",
        "quantize.seq_len=0",
        "quantize.n_sequences=0",
        "quantize.seed=-1",
        "quantize.percdamp=0",
        "quantize.clip_norm=0",
        "quantize.cd_passes=-1",
        "quantize.block_size=0",
        "quantize.baselines=[none,none]",
        "evaluate.sources=[]",
        "evaluate.sources=[pydoc,pydoc]",
        "evaluate.sources=[wiki.txt]",
        "evaluate.seq_len=1",
        "evaluate.max_sequences=-1",
        "evaluate.task_limit=-1",
        "evaluate.tasks=[piqa,piqa]",
        "evaluate.tasks=[mmlu]",
        "distributed.nproc=0",
        "distributed.timeout_s=0",
        "distributed.threads=-1",
    ],
)
def test_values_out_of_range_are_refused_by_name(override: str) -> None:
    assert error_of(None, MODEL, override).startswith(override.partition("=")[0] + " is ")


def test_not_a_number_never_passes_a_range() -> None:
    nan = float("nan")
    for build in (
        lambda: OptimizeConfig(lr=nan),
        lambda: OptimizeConfig(momentum=nan),
        lambda: OptimizeConfig(max_grad_norm=nan),
        lambda: QuantConfig(a_clip_ratio=nan),
        lambda: QuantizeConfig(percdamp=nan),
    ):
        with pytest.raises(UserError, match="is nan"):
            build()


@pytest.mark.parametrize(
    "override",
    [
        *(f"quant.{tensor}_bits={bits}" for tensor in "wakv" for bits in (2, 8, 16)),
        "quant.a_clip_ratio=1",
        "optimize.warmup_steps=99",
        "optimize.micro_batch_size=8",
        "optimize.max_grad_norm=0",
        "optimize.seed=-1",
        "optimize.source=hf:owner/name:config:column",
        "optimize.source=text:a.txt,b.txt#all",
        "quantize.source=tokens:rows.npy#all",
        "evaluate.sources=[pydoc,wikitext2,c4]",
    ],
)
def test_the_ends_of_the_ranges_are_accepted(override: str) -> None:
    assert load_config(None, [MODEL, override]) != load_config(None, ["model.path=other"])


def test_a_mistyped_source_gets_a_suggestion() -> None:
    assert "did you mean wikitext2?" in error_of(None, MODEL, "optimize.source=wikitext-2")


def test_settings_cannot_change_behind_the_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizeConfig().steps = 0  # type: ignore[misc]


def strategy_of(kind: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Values of a type as a user may write them."""
    controls = ("Cc", "Zl", "Zp")
    text = st.text(
        st.characters(codec="utf-8", exclude_categories=controls, exclude_characters="/"), min_size=1, max_size=50
    )
    awkward = st.sampled_from(["null", "~", "1e-4", "off", "0x10", "[a]", "{a: 1}", "a: b #c", "- x", "'", " pad "])
    if kind is str:
        return text.filter(lambda value: value not in (".", "..")) | awkward
    return {
        int: st.integers(1, 2**15),
        float: st.floats(2.0**-126, 1.0, exclude_max=True),
        bool: st.booleans(),
    }.get(kind, st.none())


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    groups: dict[str, typing.Any] = {}
    for leaf in (ModelConfig, QuantConfig, QuantizeConfig):
        hints = typing.get_type_hints(leaf)
        values = {
            name: draw(strategy_of(kind))
            for name, kind in hints.items()
            if kind in (int, float, bool, str) and not name.endswith("_bits") and name != "source"
        }
        if values.get("tune_steps"):  # which takes whole models
            values["layers_per_job"] = 0
        groups[leaf.__name__.removesuffix("Config").lower()] = leaf(**values)
    sources = draw(st.lists(strategy_of(str).map(lambda text: f"text:{text}"), min_size=1, unique=True))
    name = draw(strategy_of(str).filter(lambda text: not text.startswith("-")))
    return resolve_presets(RunConfig(name=name, evaluate=EvaluateConfig(sources=sources), **groups))


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=run_configs())
def test_what_is_dumped_loads_equal_and_dumps_the_same(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(str(path), [])
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_the_dump_lists_every_setting_in_the_order_of_the_dataclasses() -> None:
    text = dump_config(load_config(None, [MODEL]))
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == [item.name for item in dataclasses.fields(RunConfig)]
    optimize = text.partition("\noptimize:\n")[2].partition("\nquantize:\n")[0]
    assert re.findall(r"^  (\w+):", optimize, re.MULTILINE) == [i.name for i in dataclasses.fields(OptimizeConfig)]


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=60)
    | st.lists(
        st.sampled_from(["optimize:", "  steps:", " ", "\n", "3", "[", "]", "{", "}", "- ", "name: ", "&a ", "*a"])
    ).map("".join)
)
def test_any_text_loads_or_fails_with_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    message = "loaded"
    try:
        load_config(str(path), [MODEL])
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_files_load(path: Path) -> None:
    assert load_config(str(path), []).model.path


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_we_ship_is_accepted(path):
    assert load_config(str(path), []).name
