"""An export in the hands of ExecuTorch: its pre-quantised Llama loader, and its exporter and CPU runtime."""

import json
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load(directory: Path, inject_r4: bool = True) -> Any:
    """The module that ExecuTorch's own loader makes of an export, as dist_spin.json says; tokens [1, T] to logits."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (its Hadamard operator)
    from executorch.examples.models.llama.model import Llama2Model
    from executorch.examples.models.llama.source_transformation import spin_quant
    from executorch.extension.llm.export.config.llm_config import DtypeOverride, LlmConfig, PreqMode, SpinQuant

    kinds: dict[str, type[Enum]] = {"preq_mode": PreqMode, "dtype_override": DtypeOverride, "use_spin_quant": SpinQuant}
    settings = json.loads((directory / "dist_spin.json").read_text())["llm_config"]
    config = LlmConfig()
    for group, entries in settings.items():
        for name, value in entries.items():
            setattr(getattr(config, group), name, kinds[name](value) if name in kinds else value)
    config.base.checkpoint, config.base.params = str(directory / "consolidated.00.pth"), str(directory / "params.json")
    config.export.max_seq_length = config.export.max_context_length = 512
    config.debug.generate_full_logits = True
    config.model.use_kv_cache = False
    config.model.enable_dynamic_shape = False
    model = Llama2Model(config).get_eager_model().eval()
    if inject_r4 and "use_spin_quant" in settings["quantization"]:
        spin_quant.inject_fast_hadamard_transform_native_for_spin_quant(model)
    return model


def program(model: Any, ids: Tensor) -> bytes:
    """A .pte of the module for tokens like ids [1, T], its products lowered to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    with torch.no_grad():
        lowered = to_edge_transform_and_lower(
            torch.export.export(model, (ids,), strict=False),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        return lowered.to_executorch().buffer


def run(pte: bytes, ids: Tensor) -> Tensor:
    """Logits of a .pte in ExecuTorch's CPU runtime."""
    from executorch.extension.pybindings import portable_lib  # isort: split
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers kernels with the runtime)
    from executorch.kernels import quantized  # noqa: F401 (the same)

    return portable_lib._load_for_executorch_from_buffer(pte).forward((ids,))[0]
