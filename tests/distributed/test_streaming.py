"""Every rank reads its own rows alone: no process ever holds the model, or even much more than its share of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

WORKER = Path(__file__).with_name("load_worker.py")
MIB = 1 << 20


def write_shards(directory: Path, h: int = 2048, i: int = 8192, vocab: int = 32000, layers: int = 14) -> int:
    """A checkpoint of arbitrary bf16 numbers (2.1 GB) in several files, written one at a time; bytes of its largest tensor.

    h, i, vocab, layers = 4096, 14336, 128256, 32 makes one of 18 GB, of the size of Llama-3-8B, to try on GPUs:
        torchrun --nproc_per_node 2 tests/distributed/load_worker.py DIRECTORY cuda
    """
    config = LlamaConfig(
        hidden_size=h,
        intermediate_size=i,
        num_hidden_layers=layers,
        num_attention_heads=h // 128,
        num_key_value_heads=h // 128,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    base = torch.randn(vocab * h, dtype=torch.bfloat16)

    def numbers(*shape: int) -> torch.Tensor:
        return base[: math.prod(shape)].view(shape).clone()

    where: dict[str, str] = {}
    total = 0

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> int:
        tensors = {name: numbers(*shape) for name, shape in shapes.items()}
        save_file(tensors, directory / file)
        where.update(dict.fromkeys(tensors, file))
        return sum(t.numel() * 2 for t in tensors.values())

    for layer in range(layers):
        shapes = {f"self_attn.{p}_proj": (h, h) for p in "qkvo"} | {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h)}
        shapes |= {"mlp.down_proj": (h, i), "input_layernorm": (h,), "post_attention_layernorm": (h,)}
        named = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        total += write(f"layer{layer}.safetensors", named)
    ends = {"model.embed_tokens.weight": (vocab, h), "lm_head.weight": (vocab, h), "model.norm.weight": (h,)}
    total += write("ends.safetensors", ends)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert total >= 2e9
    return vocab * h * 2


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_load_two_gigabytes_within_their_share(tmp_path):
    largest = write_shards(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path), "cpu"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == 2
    for rank in ranks:
        print(f"peak above imports {rank['above'] / MIB:.0f} MiB, share {rank['shard'] / MIB:.0f} MiB")
        assert rank["above"] <= rank["shard"] + largest + 512 * MIB
