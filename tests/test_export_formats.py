"""The table of export formats, and descriptions of exports that earlier versions wrote."""

import json
from typing import get_args, get_type_hints

import pytest
from exported import NO_HAD, exported, make_run, settings

import dist_spin
from dist_spin.cli import main
from dist_spin.config.export import ExportConfig
from dist_spin.export.formats import FORMATS
from dist_spin.export.sidecar import NAME, _checksum, read_description

pytestmark = pytest.mark.usefixtures("restored_process")


def test_the_settings_name_the_formats_of_the_table():
    assert set(get_args(get_type_hints(ExportConfig)["target"])) == {"none", *FORMATS}


def test_an_export_described_as_version_0_1_did_is_complete_and_loads(tmp_path, capfd):
    words = settings(tmp_path, "gqa_tied", *NO_HAD)
    make_run(words, "optimize")
    directory = exported(words, "hf")
    content = json.loads((directory / NAME).read_text())
    fingerprint = content["fingerprint"]
    old = {"made_under" if key == "fingerprint" else key: value for key, value in content.items() if key != "checksum"}
    (directory / NAME).write_text(json.dumps({**old, "checksum": _checksum(old, {})}))
    assert read_description(directory)["fingerprint"] == fingerprint
    assert dist_spin.load(directory, device="cpu").config.model_type == "llama"
    before = (directory / NAME).read_bytes()
    capfd.readouterr()
    assert main(["export", *words, "--format", "hf"]) == 0
    assert "is complete" in "".join(capfd.readouterr())
    assert (directory / NAME).read_bytes() == before
