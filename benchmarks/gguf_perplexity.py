"""What llama.cpp's weight types and quantised caches make of the rotated model and of the original: perplexity of both.

    python benchmarks/gguf_perplexity.py ORIGINAL.gguf ROTATED.gguf tokens.npy --weights F32 Q4_K Q4_0 --caches F16 Q8_0 Q4_0

The files are 32-bit exports (`dist-spin export --format gguf model.dtype=float32`), the original one of a run with
rotation.init=identity optimize.steps=0. Linears become the type asked for, embedding and head Q6_K beside Q4_K and Q8_0 beside
the others; with Q4_K, rows that are no multiple of 256, as SmolLM2's 576, become Q5_0 and Q8_0, as llama.cpp's own quantiser
does it. Its library is called for the rounding, since the wheel has the function but no program. llama.cpp computes the last
hidden states of each window, in one pass that reads the cache as it was written; their product with lm_head is taken here.
LLAMA_ATTN_ROT_DISABLE=1 keeps llama.cpp from turning queries, keys and values before it rounds them.
"""

import argparse
import ctypes
import json
import math
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import torch
import xllamacpp

FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # of rows that super-blocks of 256 do not divide


def quantise(source: Path, target: Path, weights: str) -> None:
    """Copy a GGUF file with its linears rounded to the type `weights`."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data = np.ascontiguousarray(tensor.data, dtype=np.float32)
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
            continue
        embedding_or_head = tensor.name in ("output.weight", "token_embd.weight")
        name = ("Q6_K" if weights == "Q4_K" else "Q8_0") if embedding_or_head else weights
        if data.shape[1] % 256 and name in FALLBACK:
            name = FALLBACK[name]
        kind = gguf.GGMLQuantizationType[name]
        out = np.empty(gguf.quant_shape_to_byte_shape(data.shape, kind), dtype=np.uint8)
        rows, width = (ctypes.c_int64(n) for n in data.shape)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (data, out))
        written = library.ggml_quantize_chunk(int(kind), *pointers, ctypes.c_int64(0), rows, width, None)
        assert written == out.nbytes
        writer.add_tensor(tensor.name, out, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head(file: Path) -> torch.Tensor:
    """The weight of lm_head [vocab, h], fp32: the embedding where they are tied."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = tensors.get("output.weight", tensors["token_embd.weight"])
    return torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))


def hidden_states(address: str, tokens: list[int]) -> list[list[float]]:
    """Of every token, behind the last norm, [T][h]; asked over HTTP, where alone the server gives them unpooled."""
    question = json.dumps({"content": tokens}).encode()
    request = urllib.request.Request(f"{address}/embedding", question, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: list[list[float]] = json.load(answer)[0]["embedding"]
    return found


def perplexity(file: Path, windows: np.ndarray, cache: str) -> float:
    """exp of the mean -log p of every token but the first of windows [n, T], keys and values held as the type `cache`."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.warmup = str(file), 1, False
    params.n_ctx = params.n_batch = params.n_ubatch = windows.shape[1]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache}")
    params.embedding, params.embd_normalize = True, -1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    server, weight, total = xllamacpp.Server(params), head(file), 0.0
    for window in windows.tolist():
        states = torch.tensor(hidden_states(server.listening_address, window))
        assert states.shape == (len(window), weight.shape[1])
        for part, tokens in zip(states[:-1].split(256), torch.tensor(window[1:]).split(256), strict=True):
            total += float(torch.nn.functional.cross_entropy(part @ weight.T, tokens, reduction="sum"))
    return math.exp(total / (windows.size - len(windows)))


def main() -> None:
    """Round both files to each type and print a row for each, with a column for each type of the cache."""
    parser = argparse.ArgumentParser()
    parser.add_argument("original", type=Path)
    parser.add_argument("rotated", type=Path)
    parser.add_argument("tokens", type=Path, help="token ids [n, T]")
    parser.add_argument("--weights", nargs="+", default=["F32", "Q4_K", "Q4_0", "MXFP4"], help="types of linears")
    parser.add_argument("--caches", nargs="+", default=["F16", "Q8_0", "Q4_0"], help="types of keys and values")
    parser.add_argument("--windows", metavar="N", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--length", metavar="T", type=int, default=512, help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument("--threads", metavar="N", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows = np.load(options.tokens)[: options.windows, : options.length].astype(np.int64)
    print("model | weights | " + " | ".join(f"cache {cache}" for cache in options.caches), flush=True)
    for weights in options.weights:
        for name, path in (("original", options.original), ("rotated", options.rotated)):
            with tempfile.TemporaryDirectory() as folder:
                file = path
                if weights != "F32":
                    file = Path(folder) / f"{name}.gguf"
                    quantise(path, file, weights)
                found = [f"{perplexity(file, windows, cache):.3f}" for cache in options.caches]
            print(f"{name} | {weights} | " + " | ".join(found), flush=True)


if __name__ == "__main__":
    main()
