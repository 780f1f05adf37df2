"""The run that the kill loop kills: a random model, what a user types, and what of the files it writes is always the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# Files that tell of a start rather than of the run's content, and the keys of JSON files that do.
VOLATILE_FILES = ("events.jsonl", "report.html", "report.md", "README.md")
VOLATILE_FOLDERS = ("logs", "tensorboard", "locks")
VOLATILE_KEYS = ("seconds", "time", "wait_s", "bytes", "hosts", "date", "path", "checksum")  # which covers the seconds


def write_inputs(out: Path) -> list[str]:
    """A random Llama of four layers and its tokens; returns the settings of every command. Torch would take seconds to import."""
    model, tokens = out / "model", out / "tokens.npy"
    model.mkdir(parents=True, exist_ok=True)
    vocabulary, width, inner, layers = 97, 48, 80, 4
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "model.norm": (width,)}
    for index in range(layers):
        shapes |= {
            f"model.layers.{index}.{name}": shape
            for name, shape in {
                "input_layernorm": (width,),
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (width // 2, width),
                "self_attn.v_proj": (width // 2, width),
                "self_attn.o_proj": (width, width),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }.items()
        }
    draw = np.random.default_rng(0)
    weights = {
        f"{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else draw.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    (model / "config.json").write_text(json.dumps(config))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    np.save(tokens, draw.integers(3, vocabulary, (24, 24)))
    return [
        f"model.path={model}",
        "model.dtype=float32",
        "rotation.r4_block=16",
        *(f"{stage}.seq_len=24" for stage in ("optimize", "quantize", "evaluate")),
        *(f"{stage}.source=tokens:{tokens}#all" for stage in ("optimize", "quantize")),
        f"evaluate.sources=[tokens:{tokens}#all]",
        "optimize.steps=6",
        "optimize.batch_size=2",
        "quantize.n_sequences=4",
        "quantize.layers_per_job=1",
        "compare.methods=[hadamard, ours]",
        "compare.bits=[W4A4KV4]",
        "compare.weights=[gptq]",
        "compare.seeds=[0]",
        "distributed.device=cpu",
        "distributed.threads=1",
        "distributed.timeout_s=60",
    ]


def commands(directory: Path, settings: list[str]) -> list[list[str]]:
    """What a user types, in order."""
    words = [*settings, f"output_dir={directory}"]
    learned = ["optimize.steps=0", f"rotation.load={directory}/whole/rotations/R.bin", "name=fan"]
    return [
        ["run", *words, "name=whole", "distributed.nproc=2"],
        ["quantize", "--cluster", "local", "--workers", "2", "--retries", "99", *words, *learned],
        ["evaluate", *words, *learned],
        ["export", "--format", "hf", *words, *learned],
        ["compare", *words, "name=compared"],
    ]


def artefacts(directory: Path) -> dict[str, str]:
    """A digest of the content of every file that does not tell of a single start."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and path.name not in VOLATILE_FILES and not {*VOLATILE_FOLDERS} & {*name.parts}:
            content = path.read_bytes()
            if path.suffix in (".json", ".jsonl"):
                lines = content.splitlines() if path.suffix == ".jsonl" else [content]
                content = json.dumps([without_volatile(json.loads(line)) for line in lines], sort_keys=True).encode()
            digests[str(name)] = hashlib.sha256(content.replace(bytes(directory), b"")).hexdigest()
    return digests


def without_volatile(value: Any) -> Any:
    """JSON without what differs from start to start."""
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if not any(word in k for word in VOLATILE_KEYS)}
    if isinstance(value, list):
        return [without_volatile(item) for item in value]
    return value
