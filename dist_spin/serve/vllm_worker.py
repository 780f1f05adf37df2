"""The side of `dist-spin serve-check` that runs in vLLM's own environment; it imports nothing of ours.

    PYTHON vllm_worker.py REQUEST.json ANSWER.json

One process loads export after export, since starting the engine takes longer than asking it. Written for vLLM 0.25 to 0.33.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

EMULATE = "DIST_SPIN_EMULATE"  # in the environment, so that every process that vLLM starts finds it


def main() -> None:
    """Answer every request of the file; an export that does not load is answered with the engine's error."""
    request = json.loads(Path(sys.argv[1]).read_text())
    import vllm

    answers: dict[str, Any] = {"engine": f"vLLM {vllm.__version__}", "exports": []}
    for export in request["exports"]:
        try:
            answers["exports"].append(_served(export, request))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answers["exports"].append({"error": f"{type(error).__name__}: {' '.join(lines[:3])}"})
        _forget_engine()
        # Each answer at once, and whole: the next export may end the process, and a full disk this one.
        unfinished = Path(f"{sys.argv[2]}.unfinished")
        unfinished.write_text(json.dumps(answers))
        unfinished.replace(sys.argv[2])


def _emulate_on_cpus() -> None:
    """Let the engine's emulation of NVFP4, which is plain torch there, be chosen on CPUs, for which it names no kernel."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    linear._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, [linear.EmulationNvFp4LinearKernel])


def _served(export: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """What the engine computes of one export: see `Answer` in engine.py."""
    from vllm import LLM, SamplingParams

    windows, n_tokens = export["windows"], request["new_tokens"]
    backend = {"linear_backend": export["linear_backend"]} if export["linear_backend"] else {}
    llm = LLM(
        export["path"],
        dtype=export["dtype"],
        max_model_len=max(len(window) for window in windows) + n_tokens,
        max_num_seqs=min(8, len(windows)),
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        tensor_parallel_size=request["tensor_parallel"],
        kv_cache_dtype=request["kv_cache_dtype"],
        worker_extension_cls=f"{Path(__file__).stem}.{NamesKernels.__name__}",
        **backend,
    )
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0, detokenize=False)
    greedy = SamplingParams(max_tokens=n_tokens, temperature=0.0, detokenize=False, ignore_eos=True)
    prompts = [window[: len(window) // 2] for window in windows]
    read = llm.generate([{"prompt_token_ids": window} for window in windows], scored, use_tqdm=False)
    written = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    kernels = llm.collective_rpc("dist_spin_kernels")
    return {
        "window_logprobs": [
            [entry[token].logprob for token, entry in zip(window[1:], out.prompt_logprobs[1:], strict=True)]
            for window, out in zip(windows, read, strict=True)
        ],
        "greedy": [list(out.outputs[0].token_ids) for out in written],
        "kernels": kernels[0],
    }


class NamesKernels:
    """What vLLM adds to each of its worker processes, which a function cannot be sent to under tensor parallelism."""

    def dist_spin_kernels(self) -> list[str]:
        """As `_kernels`, of this process's part of the model."""
        return _kernels(self.get_model())  # type: ignore[attr-defined]


def _kernels(model: Any) -> list[str]:
    """What multiplies in each kind of linear: "name: scheme (kernel)", each once."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "scheme", None)
        method = scheme if scheme is not None else getattr(module, "quant_method", None)
        if method is None or not hasattr(module, "weight_loader"):
            continue
        inner = getattr(method, "kernel", None) or getattr(method, "fp8_linear", None)
        kernel = f" ({type(inner).__name__})" if inner is not None else ""
        found[f"{name.rpartition('.')[2]}: {type(method).__name__}{kernel}"] = None
    return list(found)


def _forget_engine() -> None:
    """Let go of a model and of its process group, so that the next one finds the memory free."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
elif __name__ == Path(__file__).stem and os.environ.get(EMULATE):  # as vLLM imports it in each of its worker processes
    _emulate_on_cpus()
