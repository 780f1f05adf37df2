"""Settings after mishaps: files as damage, editors and other tools leave them, and any value of any setting.

Whatever is read is either a run's settings, which are dumped and read back equal, or one line with a remedy.
"""

import dataclasses
from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dist_spin.config.loader import dump_config, load_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError

MODEL = "model.path=some/model"
CONFIGS = Path(__file__).parent.parent / "configs"
DEFAULTS = load_config(None, [MODEL])
KEYS = [
    f"{group}.{key}" for group, leaf in vars(DEFAULTS).items() if dataclasses.is_dataclass(leaf) for key in vars(leaf)
]


def outcome(path: Path | None, *overrides: str) -> RunConfig | UserError:
    """What a user gets: the settings, or an error. Anything else that is raised fails the test."""
    try:
        return load_config(None if path is None else str(path), overrides)
    except UserError as error:
        return error


def check_error(error: UserError) -> None:
    """One short line with a remedy."""
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1000
    assert error.remedy, str(error)


FILES = [path.read_bytes() for path in sorted(CONFIGS.rglob("*.yaml"))]
FILES.append(dump_config(DEFAULTS).encode())
SPLICES = [
    *(
        b"\x00",
        b"\t",
        b"\xff",
        b"\n",
        b"\r",
        b": ",
        b"- ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"'",
        b'"',
        b"#",
        b"&a ",
        b"*a",
        b"!!int ",
    ),
    *(
        b"|\n",
        b">-\n",
        b"? ",
        b"---\n",
        b"...\n",
        b"%YAML 1.2\n",
        b"@",
        b"`",
        b"\\",
        b"<<: ",
        b"~",
        b"null",
        b".nan",
        b".inf",
    ),
    *(
        b"-1",
        b"0",
        b"1e308",
        b"1e-320",
        b"9" * 30,
        b"9" * 5000,
        b"[" * 50,
        b"0x10",
        b"1:30",
        b"2020-01-01",
        b"true",
        b"''",
    ),
    *(
        b'"\\UFFFFFFFF"',
        b"\n%YAML 1." + b"9" * 5000 + b"\n",
        "é".encode(),
        "\u2028".encode(),
        "\ufeff".encode(),
        "名".encode(),
        "𝟙".encode(),
        "²".encode(),
        b"\xed\xa0\x80",
    ),
]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A file of settings after one to four mishaps."""
    content = draw(st.sampled_from(FILES))
    for _ in range(draw(st.integers(1, 4))):
        lines = content.splitlines(keepends=True)
        at, line = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(0, max(0, len(lines) - 1)))
        other = draw(st.integers(0, max(0, len(lines) - 1)))
        match draw(st.sampled_from(["flip", "splice", "value", "drop", "repeat", "swap", "indent", "values", "cut"])):
            case "flip":
                content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
            case "splice":
                content = content[:at] + draw(st.sampled_from(SPLICES)) + content[at:]
            case "cut":
                content = content[:at]
            case kind if lines:
                key, colon, _ = lines[line].partition(b":")
                if kind == "value":
                    lines[line] = key + colon + b" " + draw(st.sampled_from(SPLICES)) + b"\n"
                elif kind == "drop":
                    del lines[line]
                elif kind == "repeat":
                    lines.insert(other, lines[line])
                elif kind == "swap":
                    lines[line], lines[other] = lines[other], lines[line]
                elif kind == "indent":
                    lines[line] = b" " * draw(st.integers(1, 5)) + lines[line]
                else:
                    lines[line] = key + colon + lines[other].partition(b":")[2]
                content = b"".join(lines)
    return content


@hypothesis_settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged_files())
def test_damaged_files_load_or_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    result = outcome(path)
    if isinstance(result, UserError):
        check_error(result)
    else:
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(result), encoding="utf-8")
        assert load_config(str(again), []) == result


@hypothesis_settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_of_any_setting_loads_or_is_refused_in_one_line(data):
    key = data.draw(st.sampled_from(KEYS))
    spliced = st.sampled_from(SPLICES).map(lambda piece: piece.decode("utf-8", "surrogateescape"))
    value = data.draw(st.text(max_size=30) | spliced | st.integers().map(str) | st.floats().map(str))
    result = outcome(None, MODEL, f"{key}={value}")
    if isinstance(result, UserError):
        check_error(result)
    else:
        dump_config(result).encode()  # what no file can hold is refused
