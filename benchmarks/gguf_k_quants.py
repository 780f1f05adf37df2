"""What a K-quant of llama.cpp makes of the rotated model and of the original: perplexity of both, in llama.cpp itself.

    python benchmarks/gguf_k_quants.py ORIGINAL.gguf ROTATED.gguf tokens.npy

The files are 32-bit exports (`dist-spin export --format gguf model.dtype=float32`). Linears become Q4_K, embedding and head
Q6_K; rows that are no multiple of 256, as SmolLM2's 576, become Q5_0 and Q8_0, as llama.cpp's own quantiser does it. Its
library is called for the rounding, since the wheel has the function but no program. Every token of the windows is asked for
after all before it, so it takes a while.
"""

import argparse
import ctypes
import json
import math
import tempfile
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

WINDOWS, LENGTH = 4, 128
CANDIDATES = 1000  # likeliest tokens asked for; of rarer ones the server is asked for all


def quantise(source: Path, target: Path) -> dict[str, int]:
    """Copy a GGUF file with its matrices rounded; how many became which type."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        data = np.ascontiguousarray(tensor.data, dtype=np.float32)
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
            continue
        embedding_or_head = tensor.name in ("output.weight", "token_embd.weight")
        whole = data.shape[1] % 256 == 0  # K-quants round super-blocks of 256
        kind = gguf.GGMLQuantizationType[
            ("Q6_K" if whole else "Q8_0") if embedding_or_head else ("Q4_K" if whole else "Q5_0")
        ]
        out = np.empty(gguf.quant_shape_to_byte_shape(data.shape, kind), dtype=np.uint8)
        rows, width = (ctypes.c_int64(n) for n in data.shape)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (data, out))
        written = library.ggml_quantize_chunk(int(kind), *pointers, ctypes.c_int64(0), rows, width, None)
        assert written == out.nbytes
        writer.add_tensor(tensor.name, out, raw_dtype=kind)
        counts[kind.name] = counts.get(kind.name, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


def perplexity(file: Path, windows: np.ndarray) -> float:
    """exp of the mean -log p of every token but the first of windows [n, T]."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def log_p(before: list[int], token: int, among: int) -> float | None:
        request = {"prompt": before, "n_predict": 1, "n_probs": among, "temperature": 0, "cache_prompt": True}
        (reply,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        return next((top["logprob"] for top in reply["top_logprobs"] if top["id"] == token), None)

    total, count = 0.0, 0
    for window in windows.tolist():
        for i in range(1, len(window)):
            value = log_p(window[:i], window[i], CANDIDATES)
            value = log_p(window[:i], window[i], 1_000_000) if value is None else value
            assert value is not None
            total, count = total - value, count + 1
    return math.exp(total / count)


def main() -> None:
    """Round both files and print a line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("original", type=Path)
    parser.add_argument("rotated", type=Path)
    parser.add_argument("tokens", type=Path, help="token ids [n, T]")
    options = parser.parse_args()
    tokens = np.load(options.tokens)[:WINDOWS, :LENGTH]
    for name, path in (("original", options.original), ("rotated", options.rotated)):
        with tempfile.TemporaryDirectory() as folder:
            rounded = Path(folder) / f"{name}.gguf"
            types = quantise(path, rounded)
            figures = {"model": name, "types": types, "tokens": tokens.size}
            figures |= {"ppl": perplexity(path, tokens), "ppl_quantised": perplexity(rounded, tokens)}
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
