"""Exports in the real vLLM, beside what `dist_spin.load` computes: one engine process for all of them."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from exported import NO_HAD, R4_BLOCK, W4A8, W4A16, W8A8, exported, make_run
from tiny import tiny_run, write_model
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig

import dist_spin.serve.check as serve
from dist_spin.cli import main
from dist_spin.errors import EXIT_SERVED_OTHERWISE, EXIT_USER, Interrupted, NotServed
from dist_spin.runtime.cpu_features import int8_is_exact
from dist_spin.runtime.processes import process_stat
from dist_spin.serve import engine

PYTHON = Path(__file__).parent.parent / ".vllm" / "bin" / "python"
AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()
NO_WNA16 = "vLLM's build for CPUs has its kernel of 4-bit weights (cpu_gemm_wna16) for AVX-512 alone"
# Sizes that are multiples of 32, and a head size, that its kernels take.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODEL = LlamaConfig(**SIZES, tie_word_embeddings=False)
EXPERTS = Qwen3MoeConfig(
    **SIZES, tie_word_embeddings=False, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
)
# Norms on both sides, tied embeddings, windows by layer, a position embedding for each kind of layer.
WITHOUT_R1 = Gemma3TextConfig(
    **SIZES, query_pre_attn_scalar=20, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
)
W8A8_FP8 = ["quant.w_format=fp8", "quant.a_format=fp8", "quant.w_bits=8", "quant.a_bits=8"]
FP32 = "quant.arithmetic=fp32"  # activations from 127 down, as vLLM's kernels round them
ROWS = {  # dtype, format, settings
    "merged": ("float32", "hf", [*NO_HAD, *W8A8, FP32]),
    "W8A8": ("float32", "compressed-tensors", [*NO_HAD, *W8A8, FP32]),
    "W8A8, R4 in blocks": ("float32", "compressed-tensors", [*R4_BLOCK, *W8A8, FP32]),
    "FP8": ("float32", "compressed-tensors", [*NO_HAD, *W8A8_FP8]),
    "NVFP4": ("float32", "compressed-tensors", [*NO_HAD, "quant.w_format=nvfp4", "quant.a_format=nvfp4"]),
    "MXFP4": ("float32", "compressed-tensors", [*NO_HAD, "quant.w_format=mxfp4", "quant.a_format=mxfp4"]),
    "W8A8, 127.5": ("float32", "compressed-tensors", [*NO_HAD, *W8A8, "quant.arithmetic=compressed-tensors"]),
    "experts": ("float32", "hf", [*NO_HAD, *W8A8]),
    "without R1": ("float32", "hf", [*NO_HAD, *W8A8, "rotation.r1=false"]),
}
OTHER_MODELS = {"experts": EXPERTS, "without R1": WITHOUT_R1}
PACKED_ROWS = {
    "W4A16": ("bfloat16", "compressed-tensors", [*NO_HAD, *W4A16, "quant.w_group_size=32"]),
    "W4A16, asymmetric": ("bfloat16", "compressed-tensors", [*NO_HAD, *W4A16, "quant.w_symmetric=false"]),
    "W4A8": ("bfloat16", "compressed-tensors", [*NO_HAD, *W4A8, "quant.w_group_size=32", FP32]),
}
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM: make vllm-venv")
needs_vnni = pytest.mark.skipif(
    not int8_is_exact(), reason="needs VNNI instructions: 8-bit products saturate on this CPU"
)
needs_avx512 = pytest.mark.skipif(not AVX512, reason=NO_WNA16)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """An export whose making takes no time."""
    words = tiny_run(tmp_path_factory.mktemp("merged"), "optimize.steps=0", *NO_HAD)
    make_run(words, "optimize")
    return exported(words, "hf")


@pytest.fixture(scope="module")
def exports(place) -> dict[str, Path]:
    """The export of each row, by its name."""
    found = {}
    for number, (name, (dtype, target, settings)) in enumerate((ROWS | (PACKED_ROWS if AVX512 else {})).items()):
        model = place / (name if name in OTHER_MODELS else dtype)
        if not model.exists():
            write_model(OTHER_MODELS.get(name, MODEL), model)
        more = ["optimize.steps=0", "quantize.method=rtn", f"model.dtype={dtype}", f"name=run{number}"]
        words = tiny_run(place / "runs", *more, *settings, model=model, sequences=120)
        make_run(words, "optimize" if target == "hf" else "quantize")
        found[name] = exported(words, target)
    return found


@pytest.fixture(scope="module")
def checked(exports, place):
    """What serve-check prints as JSON of each row, and its exit code."""
    import contextlib
    import io

    printed = io.StringIO()
    words = [
        *map(str, exports.values()),
        "--python",
        str(PYTHON),
        "--text",
        f"tokens:{place / 'float32' / 'tokens.npy'}",
    ]
    with contextlib.redirect_stdout(printed):
        more = ["--seq-len", "20", "--sequences", "24", "--tokens", "8", "--emulate", "--json"]
        code = main(["serve-check", *words, *more])
    return code, dict(zip(exports, json.loads(printed.getvalue()), strict=True))


@pytest.mark.vllm
@needs_vllm
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("restored_process")
class TestVllm:
    def test_it_says_its_version_and_that_some_rows_differ(self, checked):
        code, rows = checked
        assert {row["engine"] for row in rows.values()} == {"vLLM 0.32.0"}
        assert code == EXIT_SERVED_OTHERWISE

    @pytest.mark.parametrize("name", ["merged", *OTHER_MODELS])
    def test_a_merged_model_is_the_same_to_the_order_of_sums(self, checked, name):
        row = checked[1][name]
        assert row["problem"] == ""
        assert row["difference"] < 1e-4
        assert row["same"] == row["tokens"] == 24 * 8
        assert row["perplexity"] == pytest.approx(row["expected_perplexity"], rel=1e-4)

    def test_int8_follows_the_oracle(self, checked):
        """The bound is derived in docs/serving.md: the same grid of activations, but for codes next to a tie."""
        row = checked[1]["W8A8"]
        if not int8_is_exact():
            assert row["problem"].endswith("8-bit products saturate on this CPU, which has no VNNI instructions")
            return
        assert row["problem"] == ""
        assert {kernel.partition(": ")[2] for kernel in row["kernels"] if "Unquantized" not in kernel} == {
            "CompressedTensorsW8A8Int8 (CPUInt8ScaledMMLinearKernel)"
        }
        assert row["difference"] < row["rounding"] / 4
        assert row["perplexity"] == pytest.approx(row["expected_perplexity"], rel=serve.PERPLEXITY)
        assert row["same"] >= 0.9 * row["tokens"]

    @needs_vnni
    def test_a_grid_of_127_and_a_half_steps_is_another(self, checked):
        """All rounding errors are drawn anew: as far as two roundings of the same activations are apart, and no further."""
        row = checked[1]["W8A8, 127.5"]
        assert row["rounding"] / 2 < row["difference"] <= row["allowed"]

    def test_what_the_engine_cannot_load_is_reported_as_its_own_error(self, checked):
        """Its build for CPUs lacks the Hadamard that it applies online."""
        assert checked[1]["W8A8, R4 in blocks"]["problem"].startswith("does not load: ")
        assert "hadacore_transform" in checked[1]["W8A8, R4 in blocks"]["problem"]

    @pytest.mark.parametrize(
        ("name", "kernel"),
        [
            ("FP8", "CompressedTensorsW8A8Fp8 (ChannelWiseTorchFP8ScaledMMLinearKernel)"),
            ("NVFP4", "CompressedTensorsW4A4Fp4 (EmulationNvFp4LinearKernel)"),
        ],
    )
    def test_floating_point_formats_follow_the_oracle(self, checked, name, kernel):
        row = checked[1][name]
        assert row["problem"] == ""
        assert {found.partition(": ")[2] for found in row["kernels"] if "Unquantized" not in found} == {kernel}
        assert row["difference"] < row["rounding"] / 4
        assert row["same"] >= 0.9 * row["tokens"]

    def test_a_format_without_a_kernel_is_reported_as_the_engine_says_it(self, checked):
        problem = checked[1]["MXFP4"]["problem"]
        assert problem.startswith("does not load: ")
        assert "Failed to find a kernel that can implement the MXFP4 linear layer" in problem

    @needs_avx512
    @pytest.mark.parametrize("name", ["W4A16", "W4A16, asymmetric"])
    def test_4_bit_weights_follow_the_oracle(self, checked, name):
        row = checked[1][name]
        assert row["problem"] == ""
        assert "qkv_proj: CompressedTensorsWNA16 (CPUWNA16LinearKernel)" in row["kernels"]

    @needs_avx512
    def test_a_kernel_of_weights_alone_is_noticed(self, checked):
        """Of packed codes beside rounded activations, vLLM takes a kernel here that leaves activations as they are."""
        row = checked[1]["W4A8"]
        assert "activations stay in 16 bits here" in row["problem"]
        assert "CPUWNA16LinearKernel" in row["problem"]


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
@needs_vnni
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("restored_process")
def test_two_processes_share_a_model_out(exports, place, capfd):
    words = [str(exports["W8A8"]), str(exports["NVFP4"]), "--python", str(PYTHON), "--emulate"]
    more = ["--text", f"tokens:{place / 'float32' / 'tokens.npy'}", "--tensor-parallel", "2"]
    more += ["--seq-len", "20", "--sequences", "24", "--tokens", "2"]
    assert main(["serve-check", *words, *more]) == 0
    said = capfd.readouterr().out
    assert said.count("pass  ") == 2
    # Each names what multiplies in it, so that activations left in 16 bits are noticed there too.
    assert "o_proj: CompressedTensorsW8A8Int8 (CPUInt8ScaledMMLinearKernel)" in said
    assert "o_proj: CompressedTensorsW4A4Fp4 (EmulationNvFp4LinearKernel)" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}", "--python", "/nowhere/python"], "--python /nowhere/python: No such file"),
        (["{}", "--python", "/bin/false"], "/bin/false has no vLLM; give --python"),
        (["{}"], "neither this interpreter nor PATH has vLLM; give --python"),
        (["{}/none", "--python", "/bin/true"], "none has no dist_spin.json"),
        (["{}", "--python", "/bin/true", "--text", "tokens:/nowhere/t.npy"], "/nowhere/t.npy"),
        (["{}", "--python", "/bin/true"], "no tokenizer can be read from"),
        (["{}", "--python", "/bin/true", "--text", "tokens:t"], "is no text source"),
        (["{}", "--python", "/bin/true", "--seq-len", "3"], "give counts above 0"),
    ],
)
def test_what_cannot_be_checked_is_one_line(merged, words, said, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["serve-check", *(word.format(merged) for word in words)]) == EXIT_USER
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("dist-spin: ")
    assert said in line


LEAVES_ONE_BEHIND = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True)"


@pytest.mark.usefixtures("restored_process")
def test_what_an_engine_has_started_ends_with_it(tmp_path):
    with (tmp_path / "out").open("w") as out:
        assert engine._run([sys.executable, "-c", LEAVES_ONE_BEHIND], tmp_path, dict(os.environ), out) == 0
    child, end = int((tmp_path / "out").read_text()), time.monotonic() + 10
    while (stat := process_stat(child)) and not stat.ended:  # a signal takes a moment to act
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_relative_path_of_the_engines_interpreter_is_from_here(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotServed, match="vLLM ended with code 1 at none: "):  # it began, and has no vLLM
        engine.ask(
            Path("bin/python"),
            [engine.Question(Path("none"), "float32", [[1, 2]], "")],
            new_tokens=1,
            tensor_parallel=1,
            kv_cache_dtype="auto",
            shown=False,
        )


@pytest.mark.usefixtures("restored_process")
def test_a_signal_ends_the_engine(tmp_path):
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with (tmp_path / "out").open("w") as out, pytest.raises(Interrupted, match="stopped by SIGINT"):
        engine._run(["sleep", "60"], tmp_path, dict(os.environ), out)


PRINTS_AND_ANSWERS = """#!{python}
import json, sys
print("what an engine prints")
json.dump({{"engine": "none", "exports": [{{"error": "it serves nothing"}}]}}, open(sys.argv[3], "w"))
"""


def test_what_the_engine_prints_does_not_mix_with_results(tmp_path, capfd):
    program = tmp_path / "python"
    program.write_text(PRINTS_AND_ANSWERS.format(python=sys.executable))
    program.chmod(0o755)
    questions = [engine.Question(Path("none"), "float32", [[1, 2]], "")]
    options = {"new_tokens": 1, "tensor_parallel": 1, "kv_cache_dtype": "auto"}
    assert engine.ask(program, questions, **options, shown=True) == ("none", [engine.Answer(error="it serves nothing")])
    said = capfd.readouterr()
    assert said.out == ""
    assert "what an engine prints" in said.err
