"""What layers keep and where they lie, measured: the plan of memory is only as good as what it counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor, nn

from dist_spin.config.loader import load_config
from dist_spin.model.activation_checkpoint import kept_bytes
from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.optimize.setup import build_training
from dist_spin.optimize.sharding.fsdp import Fsdp
from dist_spin.optimize.sharding.prefetch import FetchAhead
from dist_spin.optimize.train import forward_backward
from dist_spin.runtime.distributed import World, start, stop

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH, T = 2, 43


@pytest.fixture
def world(restored_process, request):
    yield start(request.param, 60, 1)
    stop()


@pytest.mark.slow
@pytest.mark.parametrize("world", DEVICES, indirect=True)
@pytest.mark.parametrize("level", ["layer", "sites"])
def test_a_compiled_layer_keeps_what_the_plan_counts(tmp_path, world: World, level: str):
    """In torch 2.11 a plain checkpoint, compiled, kept four times as much: a 70B did not fit on one GPU."""
    files = open_model(str(write_model("gqa_tied", tmp_path)))
    shape, spec = files.shape, QuantSpec(4)
    head = QuantSpec(4, group_size=shape.head_dim)
    rotations = Rotations(*initial("hadamard", shape, 0), world.device, torch.float32, learn=True)
    sites = Sites(spec, spec, head, head, (), ())
    model = FakeQuantModel(files.config, rotations, sites, device=world.device, dtype=torch.float32, compile=True)
    Fsdp().shard(model, world)
    Fsdp().load(model, files.weights, ())
    model.set_levels([level] * shape.layers)
    kept: list[tuple[int, ...]] = []

    def look(module: nn.Module, arguments: object, out: tuple[Tensor, None]) -> None:
        assert out[0].grad_fn is not None
        saved = [tuple(t.shape) for t in out[0].grad_fn.saved_tensors]
        kept.extend(s for s in saved if s[0] == BATCH * T or s[:2] == (BATCH, T))

    handle = model.layers[1].register_forward_hook(look)
    ids = torch.randint(3, 97, (BATCH, T), device=world.device)
    model(ids).sum().backward()
    handle.remove()
    total = sum(torch.Size(s).numel() for s in kept) * 4
    assert total == kept_bytes(shape, BATCH * T, 4, level), kept


@pytest.mark.gpu
@pytest.mark.parametrize("world", ["cuda"], indirect=True)
@pytest.mark.parametrize(("offloaded", "w_bits"), [(1, 16), (4, 16), (6, 16), (4, 4)])
def test_layers_that_are_fetched_ahead_arrive_whole(
    tmp_path: Path, world: World, offloaded: int, w_bits: int, monkeypatch
):
    """Wide layers and few tokens, so that a copy takes longer than a layer: too early a look would see old weights."""
    config = open_model(str(write_model("gqa_tied", tmp_path / "model", layers=6))).config
    config.hidden_size, config.intermediate_size, config.head_dim = 2048, 8192, 64
    config.num_attention_heads, config.num_key_value_heads = 32, 8
    config.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 97, (4, 64)))

    ahead: list[bool] = []  # of each time that a layer from the host was about to run: whether it had been fetched
    turn = FetchAhead._advance

    def noted(self: FetchAhead, k: int, following: int) -> None:
        ahead.append(k in self._fetched)
        turn(self, k, following)

    monkeypatch.setattr(FetchAhead, "_advance", noted)

    def seen(layers: int) -> list[Tensor]:
        words = ["model.dummy_weights=true", f"optimize.source=tokens:{tmp_path / 'tokens.npy'}", "optimize.split=all"]
        words += ["optimize.compile=off", "optimize.batch_size=4", "optimize.micro_batch_size=2", "optimize.seq_len=64"]
        words += [f"model.path={tmp_path / 'model'}", f"output_dir={tmp_path}", f"distributed.offload_layers={layers}"]
        words += [f"optimize.w_bits={w_bits}", "optimize.recompute=layer"]
        learning = build_training(load_config(None, words), world)
        assert learning.offloaded == layers
        losses = [forward_backward(learning) for _ in range(3)]
        learning.optimizer.reduce_gradients()
        return [torch.tensor(losses), learning.optimizer.rotations.gradient.clone()]

    for here, there in zip(seen(0), seen(offloaded), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3 * float(here.abs().max()))
    passes = 3 * 2  # of 2 sequences each, forward and backward
    assert (len(ahead), sum(ahead)) == (passes * 2 * offloaded, passes * 2 * (offloaded - 1))
