"""Rotations change nothing but what is quantised: folding, merging, attaching and their gradients."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import SHAPES, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dist_spin.errors import UserError
from dist_spin.model.activation_checkpoint import LEVELS
from dist_spin.model.architecture import norm_eps
from dist_spin.model.fake_quant_model import FakeQuantModel, parameter_source
from dist_spin.model.layers import LayerRunner
from dist_spin.model.merge import folded_rows
from dist_spin.model.rotate_quantize import RotationParam, rotate_quantize
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites import WideRMSNorm
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.cayley import tangent
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize

CPU = torch.device("cpu")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def online_sites(files: ModelFiles, bits: int) -> Sites:
    shape = files.shape
    d = shape.head_dim
    r3, r4 = (kronecker_factors(n, 0, dtype=torch.float64, device="cpu") for n in (d, shape.intermediate))
    head = QuantSpec(bits, group_size=d)
    return Sites(QuantSpec(bits), QuantSpec(bits), head, head, r3, r4)


def reference_logits(files: ModelFiles, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """transformers' own model, its norms and the softmax of its routers in the input's precision instead of fp32."""
    model = AutoModelForCausalLM.from_pretrained(files.directory, dtype=dtype, experts_implementation="eager")

    def route(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x.flatten(0, -2), router.weight, getattr(router, "bias", None))
        shares, experts = logits.softmax(-1).topk(router.top_k, -1)
        if getattr(files.config, "norm_topk_prob", True):  # Mixtral's always sum to 1
            shares = shares / shares.sum(-1, keepdim=True)
        return logits, shares, experts

    def route_by_sigmoid(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = nn.functional.linear(x.flatten(0, -2), router.weight).sigmoid()
        ranks = (scores + router.e_score_correction_bias).unflatten(-1, (router.num_group, -1))
        group = ranks.topk(2, -1).values.sum(-1)
        out_of_reach = group < group.topk(router.topk_group, -1).values[:, -1:]
        experts = ranks.masked_fill(out_of_reach[..., None], -torch.inf).flatten(1).topk(router.top_k, -1).indices
        shares = scores.gather(-1, experts)
        if router.norm_topk_prob:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return scores, router.routed_scaling_factor * shares, experts

    def route_with_correction(router: nn.Module, x: Tensor, correction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = nn.functional.linear(x.flatten(0, -2), router.weight).sigmoid()
        experts = (scores + correction).topk(router.top_k, -1).indices
        shares = scores.gather(-1, experts)
        return scores, shares / shares.sum(-1, keepdim=True), experts

    for module in list(model.modules()):
        if type(module).__name__.endswith("TopkRouter"):  # of GLM-4.5 and its like
            module.forward = route_by_sigmoid.__get__(module)
        if type(module).__name__.endswith("TopKRouter"):
            own = route_with_correction if files.config.model_type == "minimax_m2" else route
            module.forward = own.__get__(module)
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind.startswith("Gemma") and kind.endswith("RMSNorm"):  # which store w of a gain 1 + w
                setattr(module, name, WideRMSNorm(child.eps, nn.Parameter(1 + child.weight)))
            elif kind.endswith(("RMSNorm", "LayerNorm")):
                centred = "layer" if kind.endswith("LayerNorm") else "rms"
                setattr(module, name, WideRMSNorm(child.variance_epsilon, child.weight, centred))
    with torch.no_grad():
        return model(ids).logits


def merged_logits(
    files: ModelFiles, rotations: tuple[Tensor, Tensor] | None, sites: Sites, ids: Tensor, dtype
) -> Tensor:
    weights = RotatedWeights(files.weights, files.shape, rotations, sites.r4, CPU, dtype)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=dtype, rotated=rotations is not None)
    hidden = weights.embedded(ids)
    for i in range(files.shape.layers):
        hidden = runner.run(runner.build(i, weights.layer(i)), i, hidden)
    return weights.head(norm_eps(files.config)).logits(hidden)


def learning_model(
    files: ModelFiles, rotations: Rotations, sites: Sites, dtype: torch.dtype, **kwargs
) -> FakeQuantModel:
    model = FakeQuantModel(files.config, rotations, sites, device=CPU, dtype=dtype, **kwargs)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        stored = parameter_source(name)
        if stored is not None:
            folded_rows(files.weights, stored, parameter.data, 0, sites.r4, gains=model.folded)
    return model


@pytest.fixture(params=SHAPES)
def files(request, tmp_path) -> ModelFiles:
    return open_model(str(write_model(request.param, tmp_path)))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_function_is_preserved_by_fold_and_merge_with_online_hadamards(files, ids, dtype, bound):
    rotations = initial("orthogonal", files.shape, seed=3)
    logits = merged_logits(files, rotations, online_sites(files, 16), ids, dtype)
    assert relative(logits, reference_logits(files, ids, dtype)) < bound


def test_unrotated_layers_are_transformers_own_function(files, ids):
    logits = merged_logits(files, None, Sites(), ids, torch.float64)
    assert relative(logits, reference_logits(files, ids, torch.float64)) < 1e-12


def test_attach_equals_merge_with_quantised_sites(files, ids):
    r1, r2 = initial("hadamard", files.shape, seed=5)
    sites = online_sites(files, 4)
    learned = learning_model(files, Rotations(r1, r2, CPU, torch.float64), sites, torch.float64)
    with torch.no_grad():
        attached = learned(ids)
    logits = merged_logits(files, (r1, r2), sites, ids, torch.float64)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(attached, loss.view(2, -1).mean(-1), rtol=1e-9, atol=0)
    full = reference_logits(files, ids, torch.float64)
    assert relative(logits, full) > 1e-3  # the quantisers really are on


class WeightSide(nn.Module):
    """The release's formulation, written independently: every weight rotated in every forward pass, plain autograd."""

    def __init__(self, files: ModelFiles, sites: Sites, r1: Tensor, r2: Tensor) -> None:
        super().__init__()
        self.files, self.sites = files, sites
        self.r1, self.r2 = nn.Parameter(r1.clone()), nn.Parameter(r2.clone())

    def weights(self, i: int) -> dict[str, Tensor]:
        source, prefix = self.files.weights, f"model.layers.{i}."
        out: dict[str, Tensor] = {}

        def raw(name: str) -> Tensor:
            return source.rows(prefix + name).double()

        def blocks(n: int) -> Tensor:  # R2 once per head
            return torch.block_diag(*[self.r2[i]] * n)

        shape = self.files.shape.layer(i)
        routers = [role for role in ("mlp.gate", "mlp.shared_expert_gate") if source.has(f"{prefix}{role}.weight")]
        for role, norm in (
            ("self_attn.q_proj", "input_layernorm"),
            ("self_attn.k_proj", "input_layernorm"),
            ("self_attn.v_proj", "input_layernorm"),
            *(
                (role, "post_attention_layernorm")
                for role in (*shape.of_mlp("gate_proj"), *shape.of_mlp("up_proj"), *routers)
            ),
        ):
            out[f"{role}.weight"] = (raw(f"{role}.weight") * raw(f"{norm}.weight")) @ self.r1
            if source.has(f"{prefix}{role}.bias"):
                out[f"{role}.bias"] = raw(f"{role}.bias")
        heads, kv = self.files.shape.heads, self.files.shape.kv_heads
        out["self_attn.v_proj.weight"] = blocks(kv).T @ out["self_attn.v_proj.weight"]
        if "self_attn.v_proj.bias" in out:
            out["self_attn.v_proj.bias"] = out["self_attn.v_proj.bias"] @ blocks(kv)
        out["self_attn.o_proj.weight"] = self.r1.T @ raw("self_attn.o_proj.weight") @ blocks(heads)
        r4 = functools.reduce(torch.kron, self.sites.r4)
        for role in shape.of_mlp("down_proj"):
            turned = self.r1.T @ raw(f"{role}.weight")  # R4 once per width of an expert
            out[f"{role}.weight"] = turned @ torch.block_diag(*[r4] * (turned.shape[1] // len(r4)))
        for role in ("self_attn.o_proj", *shape.of_mlp("down_proj")):
            if source.has(f"{prefix}{role}.bias"):
                out[f"{role}.bias"] = raw(f"{role}.bias") @ self.r1
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            if source.has(f"{prefix}{norm}.weight"):
                out[f"{norm}.weight"] = raw(f"{norm}.weight")
        for name in ("self_attn.sinks", "mlp.gate.e_score_correction_bias"):
            if source.has(prefix + name):
                out[name] = raw(name)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        source = self.files.weights
        runner = LayerRunner(self.files.config, self.sites, device=CPU, dtype=torch.float64, rotated=True)
        hidden = source.rows("model.embed_tokens.weight").double()[ids] @ self.r1
        for i in range(self.files.shape.layers):
            weights = self.weights(i)
            layer = runner.build(i, {name: w.detach() for name, w in weights.items()})
            wrapped = {}
            own = {name for name, _ in layer.named_parameters()}
            for (
                name,
                w,
            ) in weights.items():  # o, v and down live one module deeper, inside their sites; k where its bias is apart
                role, kind = name.rsplit(".", 1)
                wrapped[name if name in own else f"{role}.linear.{kind}"] = w
            assert wrapped.keys() <= own  # functional_call passes over others
            call = runner.context(i, hidden) | {"use_cache": False}
            hidden = torch.func.functional_call(layer, wrapped, hidden, call)
        head = (source.rows("lm_head.weight").double() * source.rows("model.norm.weight").double()) @ self.r1
        logits = WideRMSNorm(self.files.config.rms_norm_eps)(hidden) @ head.T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_gradients_equal_those_of_rotating_the_weights(files, ids):
    r1, r2 = initial("hadamard", files.shape, seed=7)
    sites = online_sites(files, 4)
    rotations = Rotations(r1, r2, CPU, torch.float64, learn=True)
    learned = learning_model(files, rotations, sites, torch.float64)
    loss = learned(ids).mean()
    loss.backward()
    oracle = WeightSide(files, sites, r1, r2)
    oracle_loss = oracle(ids)
    oracle_loss.backward()
    torch.testing.assert_close(loss, oracle_loss, rtol=1e-9, atol=0)
    # The two formulations extend the network differently off the manifold, so what must agree is the gradient along it.
    assert relative(tangent(rotations.lie_grad1), tangent(oracle.r1.grad @ r1.T)) < 1e-9
    assert relative(tangent(rotations.lie_grad2), tangent(oracle.r2.grad @ r2.mT)) < 1e-9
    assert float(tangent(rotations.lie_grad1).norm()) > 1e-3


def test_site_gradient_is_the_plain_autograd_of_one_quantised_linear():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 24, generator=g, dtype=torch.float64), torch.randn(16, 24, generator=g, dtype=torch.float64)
    r = torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=torch.float64))[0]
    out_gradient, spec = torch.randn(40, 16, generator=g, dtype=torch.float64), QuantSpec(4)
    plain_x, plain_r = x.clone().requires_grad_(), r.clone().requires_grad_()
    plain = fake_quantize(plain_x @ plain_r, spec) @ (w @ plain_r).T
    plain.backward(out_gradient)
    lie_grad, site_x = torch.zeros_like(r).requires_grad_(), x.clone().requires_grad_()
    site = rotate_quantize(site_x, RotationParam(r, lie_grad), spec) @ w.T
    site.backward(out_gradient)
    torch.testing.assert_close(site, plain, rtol=1e-12, atol=1e-12)
    assert relative(site_x.grad, plain_x.grad) < 1e-12
    assert relative(tangent(lie_grad.grad), tangent(plain_r.grad @ r.T)) < 1e-9


def test_what_is_recomputed_changes_no_gradient(tmp_path, ids):
    files = open_model(str(write_model("gqa_tied", tmp_path)))
    gradients = []
    for level in LEVELS:
        rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True)
        model = learning_model(files, rotations, online_sites(files, 4), torch.float64)
        model.set_levels([level] * files.shape.layers)
        model(ids).sum().backward()
        gradients.append(rotations.gradient)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def eager_and_compiled(
    directory: Path,
    ids: Tensor,
    make: Callable[..., FakeQuantModel],
    kind: str | PreTrainedConfig = "gqa_tied",
    **options,
) -> list[Tensor]:
    """R's gradients [n] of a model of 12 layers that is eager, then compiled; one compiled graph must serve all layers.

    make(files, rotations, compile=...) returns the model. kind: of model. options: of `Rotations`.
    """
    files = open_model(str(write_model(kind, directory, layers=12)))
    gradients = []
    for compiled in (False, True):
        rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, torch.float64, learn=True, **options)
        model = make(files, rotations, compile=compiled)
        model.set_levels(["sites"] * 12)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model(ids).sum().backward()
        gradients.append(rotations.gradient)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    return gradients


@pytest.mark.slow
def test_one_compiled_graph_serves_all_layers(tmp_path, ids):
    def make(files: ModelFiles, rotations: Rotations, **more) -> FakeQuantModel:
        return learning_model(files, rotations, online_sites(files, 4), torch.float64, **more)

    gradients = eager_and_compiled(tmp_path, ids, make)
    assert relative(tangent(gradients[1][: 48 * 48].view(48, 48)), tangent(gradients[0][: 48 * 48].view(48, 48))) < 1e-9


def test_unknown_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi", "architectures": ["PhiForCausalLM"]}')
    with pytest.raises(UserError, match="'phi' is not supported: LayerNorm, whose mean"):
        open_model(str(tmp_path))


def test_missing_model_is_one_line_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match=r"model\.path"):
        open_model(str(tmp_path / "nowhere" / "model.gguf"))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="safetensors"):
        open_model(str(tmp_path))
