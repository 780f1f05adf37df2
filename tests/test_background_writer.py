"""What lies beside the work on a layer, and how its errors come to light."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_run

from dist_spin.cli import main
from dist_spin.errors import EXIT_NUMERICS, UserError
from dist_spin.quantize.background_writer import BackgroundWriter

CPU = torch.device("cpu")


def test_one_thing_is_written_at_a_time_and_an_error_is_raised_once():
    began, go, done = threading.Event(), threading.Event(), []

    def wait() -> None:
        began.set()
        assert go.wait(10)
        done.append("first")

    def fail() -> None:
        done.append("second")
        raise UserError("no room", "make some")

    with BackgroundWriter(CPU) as writer:
        writer.finish()  # nothing was begun
        writer.start(wait)
        assert began.wait(10)  # while it waits, the caller goes on
        go.set()
        writer.start(fail)
        assert done[0] == "first"
        with pytest.raises(UserError, match="no room"):
            writer.start(lambda: done.append("never"))
        writer.finish()
        writer.start(lambda: done.append("third"))
    assert done == ["first", "second", "third"]


@pytest.mark.gpu
def test_on_a_gpu_all_that_was_queued_is_done_before_it_is_written():
    device = torch.device("cuda", 0)
    factor = torch.randn(4096, 4096, device=device) / 64
    written: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    with BackgroundWriter(device) as writer:
        for k in range(5):
            product = factor
            for _ in range(20):
                product = product @ factor
            writer.start(lambda product=product: written.append(product.cpu()))
            sums.append(product.sum())
            del product
            torch.full_like(factor, float(k))  # in the memory of the product, had it been given away too early
    assert [float(host.to(device).sum()) for host in written] == [float(total) for total in sums]


@pytest.mark.parametrize(
    ("per_job", "kept"),
    [(0, ["layers/000.safetensors", "layers/001.safetensors"]), (1, ["boundaries/001", "boundaries/002"])],
)
def test_a_damaged_layer_is_told_in_one_line_and_what_was_done_before_it_is_kept(
    tmp_path, capsys, restored_process, per_job, kept
):
    words = tiny_run(tmp_path, "name=run", "optimize.steps=0", f"quantize.layers_per_job={per_job}", layers=4)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert main(["quantize", *words]) == EXIT_NUMERICS
    said = capsys.readouterr().err
    assert "model.layers.2.mlp.up_proj.weight holds nan at [1, 3]" in said.splitlines()[-1]
    assert "Traceback" not in said
    run = tmp_path / "run"
    assert sorted(str(p.relative_to(run)) for p in (*run.glob("layers/*"), *run.glob("boundaries/*"))) == kept


def test_an_error_of_the_thread_is_told_where_the_block_ends_before_anybody_has_waited(caplog):
    def fail() -> None:
        raise UserError("no room", "make some")

    with pytest.raises(UserError, match="no room"), BackgroundWriter(CPU) as writer:
        writer.start(fail)
    assert not caplog.messages

    def fail_twice() -> None:
        with BackgroundWriter(CPU) as writer:
            writer.start(fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_twice()
    assert caplog.messages == ["what was written meanwhile has failed too: UserError: no room; make some"]
