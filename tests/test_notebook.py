"""The example notebook is executed in a Jupyter kernel, on a tiny model; so is a cell that is interrupted."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from tiny import tiny_run, write_letters, write_model

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "quickstart.ipynb"


def shown(cell: Any) -> str:
    """What a cell printed and returned, as text."""
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(parts)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the kernel
    write_model("mha", tmp_path / "model")
    write_letters(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(4, 97, (30, 20)))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_notebook_runs_from_top_to_bottom(tiny: Path) -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    values = {"model": str(tiny / "model"), "source": f"tokens:{tiny / 'tokens.npy'}", "output_dir": str(tiny)}
    values |= {"steps": 2, "sequences": 4, "seq_len": 20}
    assert all(f"{name}" in notebook.cells[place].source for name in values)
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()))
    notebook.cells.insert(place + 1, given)  # as papermill does
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    texts = [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert any("learn rotations: step 2/2" in text for text in texts)  # progress is seen
    assert any("learned rotation" in text and "ppl" in text for text in texts)
    assert any("'R1': (48, 48)" in text for text in texts)
    assert "did you mean optimize.steps?" in texts[-1]
    assert "quant.w_bits is 9" in texts[-1]
    assert (tiny / "notebook" / "report.html").is_file()


LEARN = """
import dist_spin
from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted
run = dist_spin.Run(load_config(None, {words!r}))
try:
    run.learn_rotations()
except Interrupted as error:
    print("kept:", error)
"""


@pytest.mark.timeout(600)
def test_interrupting_a_cell_saves_and_the_kernel_lives_on(tiny: Path) -> None:
    words = tiny_run(tiny, "model.dtype=float32", "optimize.steps=4000", "name=stopped")
    notebook: Any = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(text) for text in (LEARN.format(words=words), "print(len(run.results()))")
    ]
    client = NotebookClient(notebook, timeout=240, kernel_name="python3")

    async def interrupt() -> None:
        while len(list((tiny / "stopped" / "rotations").glob("step_*"))) < 2:
            await asyncio.sleep(0.05)
        await client.km.interrupt_kernel()

    async def execute() -> None:
        async with client.async_setup_kernel():
            interrupter = asyncio.create_task(interrupt())
            await client.async_execute_cell(notebook.cells[0], 0)
            await interrupter
            await client.async_execute_cell(notebook.cells[1], 1)

    with ThreadPoolExecutor(1) as apart:  # where no other test, such as one with a browser, has left a loop running
        apart.submit(lambda: asyncio.run(execute())).result()
    assert "kept: stopped by a signal after step" in shown(notebook.cells[0])
    assert shown(notebook.cells[1]) == "0\n"
