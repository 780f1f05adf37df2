"""Learn a layer's transforms and clips from the full-precision layer alone: the error of its output, by AdamW.

The layer is transformers' own with the sites of `methods.transformed`; every step its matrices, gains and fake-quantised
weights are computed from the parameters and put in functionally. The residual stream stays in the runner's wide dtype, because
the error is a small difference of large numbers; products run in the network's dtype.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.transformed_layer import INVERSE, State, TransformedRunner, merged
from dist_spin.data import batch_indices
from dist_spin.errors import NumericsError
from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM
from dist_spin.model.layer_inputs import LayerTask
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.learned_clipping import clipped_quantize

CLIP_LR = 10  # times the rate of the transforms
CLIP_START = 4.0  # logit: sigmoid(4) = 0.982 of the range
EAGER_STEPS = 3  # real steps before a CUDA graph is recorded, which warm up every library
# The module of a layer that holds the buffers of each site.
INPUT_QUANT = {
    "attention": f"{ATTENTION_NORM}.input_quant",
    "mlp": f"{MLP_NORM}.input_quant",
    "down": "mlp.down_proj.input_quant",
    "o": "self_attn.o_proj.input_quant",
    "value": "self_attn.v_proj.input_quant",
    "key": "self_attn.key_site.input_quant",
}
WRAPPED_LINEARS = ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")  # linears inside another module


class Parameters(Protocol):
    """What is learned of a layer. An nn.Module too."""

    def state(self) -> State:
        """The layer's state as a differentiable function of the parameters, with inverses; wide dtype."""

    def transforms(self) -> list[nn.Parameter]:
        """Parameters with the plain learning rate."""

    def clips(self) -> list[nn.Parameter]:
        """Parameters with the rate of clips."""

    def advance(self, share: float) -> None:
        """Told before each epoch which share of the epochs is over."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. rate: of the transforms, falling to 0 along a cosine."""

    epochs: int
    batch_size: int
    rate: float
    seed: int


def learn(
    task: LayerTask,
    outputs: Tensor,
    parameters: Any,
    sites: Sites,
    options: dict[str, GPTQOptions],
    products: torch.dtype,
    schedule: Schedule,
) -> dict[str, float]:
    """Fit `parameters` (of type `Parameters`) to the layer's outputs [n, T, h]; returns the loss of the first and last epoch.

    options: how each linear's weight is rounded; empty for 16-bit weights. Losses are relative to what the layer adds to
    the residual stream.

    Raises:
        NumericsError: the loss is not finite.
    """
    student = FakeQuantLayer(task, parameters, sites, options, products)
    power = float((outputs - task.hidden).square().mean())
    n = len(task.hidden)
    per_epoch = -(-n // schedule.batch_size)
    steps = schedule.epochs * per_epoch
    groups = [(parameters.transforms(), 1.0), (parameters.clips(), CLIP_LR)]

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return (student(hidden) - target).square().mean() / power

    stepper = Stepper(loss, groups, student.runner.device)
    losses = []
    for epoch in range(schedule.epochs):
        parameters.advance(epoch / schedule.epochs)
        total = torch.zeros((), dtype=task.hidden.dtype, device=task.hidden.device)
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            chosen = batch_indices(step, schedule.batch_size, n, schedule.seed)
            rate = schedule.rate * (1 + math.cos(math.pi * step / steps)) / 2
            total += stepper.step(task.hidden[chosen], outputs[chosen], rate)
        losses.append(float(total) / per_epoch)
        if not math.isfinite(losses[-1]):
            raise NumericsError(f"layer {task.index}: the loss is {losses[-1]}", "lower methods.flat_lr")
    return {"first_loss": losses[0], "last_loss": losses[-1]}


class FakeQuantLayer:
    """The fake-quantised layer as a function of its parameters."""

    def __init__(
        self,
        task: LayerTask,
        parameters: Any,
        sites: Sites,
        options: dict[str, GPTQOptions],
        products: torch.dtype,
    ) -> None:
        base = task.runner
        self.parameters, self.options, self.products, self.shape = parameters, options, products, base.shape
        self.weights = {name: w.to(base.device, base.dtype) for name, w in task.weights.items()}
        start = {name: tensor.detach() for name, tensor in parameters.state().items()}
        self.runner = TransformedRunner(
            base.config, sites, lambda index: start, device=base.device, dtype=base.dtype, products=products
        )
        self.layer = self.runner.build(task.index, self.weights)
        narrow = self.runner.context(task.index, task.hidden[:1].to(products))  # rotary factors in the products' dtype
        self.context = {"use_cache": False, **narrow}
        known = {name for name, _ in self.layer.named_buffers()} | {name for name, _ in self.layer.named_parameters()}
        self.known = known

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [batch, T, h] through the layer."""
        return torch.func.functional_call(self.layer, self._tensors(), (hidden,), self.context)

    def _tensors(self) -> dict[str, Tensor]:
        state = self.parameters.state()
        weights = merged(self.weights, state, self.shape)
        out = {}
        for name, w in weights.items():
            role, _, kind = name.rpartition(".")
            if role in self.options and kind == "weight":
                w = self._rounded(role, w, state)
            if role in (ATTENTION_NORM, MLP_NORM):
                out[f"{role}.norm.{kind}"] = w
            else:
                out[f"{role}.linear.{kind}" if role in WRAPPED_LINEARS else name] = w.to(self.products)
        for name, tensor in state.items():
            site, _, kind = name.removesuffix(INVERSE).rpartition(".")
            if site == "key" and kind == "left":
                key_site = INPUT_QUANT[site].removesuffix(".input_quant")
                out[f"{key_site}.inverse" if name.endswith(INVERSE) else f"{key_site}.left"] = tensor
            elif site in INPUT_QUANT and f"{INPUT_QUANT[site]}.{kind}" in self.known and not name.endswith(INVERSE):
                out[f"{INPUT_QUANT[site]}.{kind}"] = tensor
        return out

    def _rounded(self, role: str, w: Tensor, state: State) -> Tensor:
        o = self.options[role]
        if (shrink := state.get(f"{role}.shrink")) is None:
            one = torch.ones((), dtype=w.dtype, device=w.device)
            return clipped_quantize(w, (one, one), o.bits, o.symmetric, o.group_size)
        return clipped_quantize(w, (shrink[0], shrink[1]), o.bits, o.symmetric, o.group_size, even=True)


class Stepper:
    """One AdamW step after another; on a GPU as a replayed CUDA graph, because a step is a thousand small kernels.

    loss: of a batch, a function of two tensors whose shapes never change. groups: parameters with the factor of their
    learning rate.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        groups: list[tuple[list[nn.Parameter], float]],
        device: torch.device,
    ) -> None:
        self.loss, self.count = loss, 0
        groups = [(parameters, factor) for parameters, factor in groups if parameters]
        self.factors = [factor for _, factor in groups]
        self.rates = [torch.tensor(0.0, device=device) for _ in groups]
        given = [{"params": group, "lr": rate} for (group, _), rate in zip(groups, self.rates, strict=True)]
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(given, weight_decay=0.0, capturable=cuda)
        self.recorded = cuda
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, hidden: Tensor, target: Tensor, rate: float) -> Tensor:
        """One optimiser step on a batch; its loss before the step, a scalar on the device."""
        for tensor, factor in zip(self.rates, self.factors, strict=True):
            tensor.fill_(rate * factor)
        self.count += 1
        if not self.recorded:
            return self._step(hidden, target)
        if self.count <= EAGER_STEPS:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self._step(hidden, target)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.graph is None:
            self.hidden, self.target = hidden.clone(), target.clone()
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.last = self._step(self.hidden, self.target)
            except RuntimeError as error:  # a library that cannot be recorded costs speed, no result
                warnings.warn(f"no CUDA graph ({str(error).splitlines()[0]}): slower", stacklevel=2)
                self.recorded = False
                return self._step(hidden, target)
            self.graph = graph
        else:
            self.hidden.copy_(hidden)
            self.target.copy_(target)
        self.graph.replay()
        return self.last

    def _step(self, hidden: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(hidden, target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def clip_logits(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """A parameter whose sigmoid is the share of a range that is kept."""
    return nn.Parameter(torch.full(shape, CLIP_START, dtype=like.dtype, device=like.device))


class WeightClips(nn.Module):
    """Learned clipping of every linear's rows, or of their groups (learnable weight clipping, Shao et al. 2024, OmniQuant)."""

    def __init__(self, weights: dict[str, Tensor], options: dict[str, GPTQOptions], like: Tensor) -> None:
        super().__init__()
        self.roles = [role for role in LAYER_LINEARS if role in options]
        shapes = []
        for role in self.roles:
            rows, columns = weights[f"{role}.weight"].shape
            o = options[role]
            # A symmetric grid has one bound.
            shapes.append((1 if o.symmetric else 2, rows, columns // (o.group_size or columns), 1))
        self.logits = nn.ParameterList([clip_logits(shape, like) for shape in shapes])

    def state(self) -> State:
        """ROLE.shrink of every linear, [2, out, groups, 1]."""
        return {
            f"{role}.shrink": torch.sigmoid(logits).expand(2, -1, -1, -1)
            for role, logits in zip(self.roles, self.logits, strict=True)
        }
