"""A small mixture of experts, trained here on real text, then rotated and quantised: none, Hadamard and learned at W4A4KV4.

    python benchmarks/tiny_moe.py OUT --minutes 5 --balance
    python benchmarks/tiny_moe.py OUT --seeds 0 1 2 --sequences 2000
    python benchmarks/tiny_moe.py OUT --steps 400 quantize.expert_tokens=all

The model is a Qwen3-MoE of random weights over bytes, trained for --minutes on the sources and documentation of Python's
standard library, so that routers have learned to route and activations have the outliers that training makes. An OUT/model that
is there is used again. Prints perplexities per byte of text that neither training nor learning saw, and how evenly the routers
share out the calibration text; with --balance also what comes of less of it, whichever tokens make an expert's Hessian.
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seeds import Losses, add_losses, difference
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig

from dist_spin.cli import report_mistakes
from dist_spin.config.loader import load_config
from dist_spin.evaluate.stage import evaluate
from dist_spin.optimize.train import train as learn
from dist_spin.quantize.stage import quantize
from dist_spin.report.experts import expert_tokens
from dist_spin.runtime.console import Console, quieten_libraries, shown_on
from dist_spin.runtime.distributed import World, start, stop
from dist_spin.storage.run_directory import run_dir

LENGTH = 256  # bytes of a sequence
BATCH = 16
RECIPE = [  # that of configs/accurate.yaml, with fewer and shorter sequences
    *("rotation.init=range", "optimize.optimizer=cayley_adam", "optimize.lr=0.004", "optimize.warmup_steps=5"),
    *("optimize.scales=true", "optimize.clips=true", "optimize.guard_every=10", "optimize.batch_size=8"),
    *("optimize.compile=off", "evaluate.unquantized_weights=true"),  # compiling takes longer than it saves here
    *("quantize.clip_norm=2", "quantize.n_sequences=256", "quantize.baselines=[none,hadamard]"),
]


def text() -> bytes:
    """The modules of Python's standard library, in the order of their names, and its documentation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return b"".join(file.read_bytes() for file in files) + "".join(topics.values()).encode()


def split(place: Path) -> Tensor:
    """What to train on, [sequences, LENGTH]; learn.npy and test.npy are written beside it: a tenth each, spread over the text."""
    whole = np.frombuffer(text(), np.uint8).astype(np.int64)
    rows = whole[: len(whole) // LENGTH * LENGTH].reshape(-1, LENGTH)
    block = np.arange(len(rows)) // 20 % 10  # neighbours in runs of 20, so that the parts share no line
    for number, name in ((8, "learn"), (9, "test")):
        np.save(place / f"{name}.npy", rows[block == number])
    return torch.from_numpy(rows[block < 8])


def model_config() -> PreTrainedConfig:
    """The smallest model with the parts of the real one: 16 experts of which a token takes 4, q/k norms, grouped keys."""
    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        output_router_logits=True,  # for the loss that balances the routers
        router_aux_loss_coef=0.01,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def every_expert(experts: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """x [n, h] through all experts as two products, with a share of 0 of those not chosen; chosen, shares [n, k] to [n, h].

    On a GPU four times the operations are nothing beside the launches of a product for each expert.
    """
    weights = shares.new_zeros(len(x), experts.num_experts).scatter(1, chosen, shares)
    inner = (x @ experts.gate_up_proj.flatten(0, 1).T).unflatten(1, (experts.num_experts, -1))  # [n, experts, 2 w]
    gate, up = inner.chunk(2, -1)
    inner = experts.act_fn(gate) * up * weights[..., None].to(up.dtype)
    return (inner.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)).to(x.dtype)


def trained(rows: Tensor, minutes: float, device: torch.device) -> nn.Module:
    """A model after `minutes` of AdamW on rows [sequences, LENGTH], its learning rate falling over that time."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model: Any = AutoModelForCausalLM.from_config(model_config(), experts_implementation="eager").to(device)
    on_gpu = device.type == "cuda"
    for module in model.modules() if on_gpu else ():
        if hasattr(module, "gate_up_proj"):
            module.forward = functools.partial(every_expert, module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=on_gpu)
    order = torch.Generator().manual_seed(0)
    batch = BATCH * (8 if on_gpu else 1)
    began, done, step = time.monotonic(), 0.0, 0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        ids = rows[torch.randint(len(rows), (batch,), generator=order)].to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = model(ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"training: step {step}, loss {float(loss.detach()):.3f}, {time.monotonic() - began:.0f} s", flush=True
            )
        step, done = step + 1, (time.monotonic() - began) / (60 * minutes)
    print(f"trained for {step} steps of {batch} x {LENGTH} bytes, to a loss of {float(loss.detach()):.3f}", flush=True)
    torch.set_float32_matmul_precision("highest")
    return model.cpu()


def routing(layers: Path) -> list[str]:
    """Lines of a table: how many calibration tokens each expert of a layer was given, from the layers' own records."""
    lines = [f"{'layer':>5} {'fewest':>8} {'median':>8} {'most':>8}  experts that saw all tokens"]
    for path in sorted(layers.glob("[0-9]*.safetensors")):
        experts = expert_tokens(path)
        tokens = np.array([count for count, _ in experts])
        everything = sum(calibrated > count for count, calibrated in experts)
        lines.append(
            f"{path.stem:>5} {tokens.min():>8} {int(np.median(tokens)):>8} {tokens.max():>8}  {everything} of {len(experts)}"
        )
    return lines


def study(args: argparse.Namespace, world: World) -> int:
    """Train, learn, quantise, measure, print."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows, model = split(args.out), args.out / "model"
    if not (model / "config.json").exists():
        trained(rows, args.minutes, world.device).save_pretrained(model)
    learn_on, test = (f"tokens:{args.out / name}.npy#all" for name in ("learn", "test"))
    settings = [
        *(f"model.path={model}", "model.dtype=float32", f"output_dir={args.out}"),
        *("quant.w_bits=4", "quant.a_bits=4", "quant.k_bits=4", "quant.v_bits=4"),
        *(f"{stage}.seq_len={LENGTH}" for stage in ("optimize", "quantize", "evaluate")),
        *(f"{stage}.source={learn_on}" for stage in ("optimize", "quantize")),
        *(f"evaluate.sources=[{test}]", f"evaluate.max_sequences={args.sequences}", f"optimize.steps={args.steps}"),
        *(*RECIPE, *args.settings),
    ]
    losses_of: Losses = {}
    for seed in args.seeds:
        drawn = [f"name=seed{seed}", *(f"{part}.seed={seed}" for part in ("rotation", "optimize", "quantize"))]
        if seed != args.seeds[0]:  # without rotations there is little to draw
            drawn.append("quantize.baselines=[hadamard]")
        config = load_config(None, [*settings, *drawn])
        for stage in (learn, quantize, evaluate):
            stage(config, world)
        run = run_dir(config)
        add_losses(losses_of, run.path)
        print(f"{'W/A/K/V':<12} {'rotation':<16} {'weights':<8} perplexity per byte, divergence from full precision")
        for row in json.loads((run.path / "results.json").read_text()):
            bits = "/".join(str(row[f"{site}_bits"]) for site in "wakv")
            figures = f"{row['ppl']:.4f}" + (f"  {row['kl']:.5f}" if "kl" in row else "")
            print(f"{bits:<12} {row['method']:<16} {row['weights']:<8} {figures}", flush=True)
        for name, other in (("learned", "hadamard"), ("learned", "none"), ("hadamard", "none")):
            losses, others = (losses_of.get((rotation, "gptq"), []) for rotation in (name, other))
            if losses and others:  # without rotations, one stands for all seeds
                gap = difference(losses, others * (len(losses) // len(others)))
                print(f"{name} - {other} = {gap}", flush=True)
    print("\n".join(routing(run.layers())), flush=True)
    for sequences, tokens in itertools.product((1, 4, 16) if args.balance else (), ("auto", "routed", "all")):
        calibrated = [f"quantize.n_sequences={sequences}", f"quantize.expert_tokens={tokens}", "quantize.baselines=[]"]
        learned = [f"rotation.load={run.rotations / 'final.safetensors'}", "rotation.init=hadamard", "optimize.steps=0"]
        once = ["optimize.warmup_steps=0", "evaluate.unquantized_weights=false", "evaluate.fidelity=false"]
        name = f"name=balance-{sequences}-{tokens}"
        config = load_config(None, [*settings, *calibrated, *learned, *once, name])
        for stage in (learn, quantize, evaluate):
            stage(config, world)
        rows_of = json.loads((run_dir(config).path / "results.json").read_text())
        ppl = next(row["ppl"] for row in rows_of if row["weights"] == "gptq")
        print(f"calibrated on {sequences * LENGTH:>6} tokens, {tokens:<6} for an expert: {ppl:.4f}", flush=True)
    return 0


def main() -> int:
    """Run the study on the device at hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the model, its texts and the run")
    parser.add_argument("--minutes", type=float, default=5, help="of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of learning rotations (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of rotations and texts (default: 0)")
    parser.add_argument("--sequences", type=int, default=400, help="that are measured (default: %(default)s)")
    parser.add_argument(
        "--balance", action="store_true", help="also calibrate on less, with each quantize.expert_tokens"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key.sub=value", help="settings of the run, which win over those here"
    )
    args = parser.parse_intermixed_args()
    quieten_libraries()
    world = start()
    try:
        return study(args, world)
    finally:
        stop()


if __name__ == "__main__":
    with shown_on(Console(sys.stderr)):
        sys.exit(report_mistakes(main))
