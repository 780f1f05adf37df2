"""Learn the transforms and clips of a layer from the full-precision layer alone: AdamW on the error of the layer's output.

The layer is transformers' own with the modules of `transformed_layer`. In every step its matrices, gains and fake-quantised
weights are computed from the parameters and put in functionally. The residual stream stays in the wide dtype of the runner,
because the error is a small difference of large numbers; products run in the dtype of the network.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.base import Figures, Method
from dist_spin.compare.methods.transformed_layer import INVERSE, State, TransformedRunner, merged
from dist_spin.data import batch_indices
from dist_spin.errors import NumericsError
from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM
from dist_spin.model.layer_inputs import LayerTask, maxima
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.learned_clipping import clipped_quantize

CLIP_LR = 10  # times the rate of the transforms
CLIP_START = 4.0  # logit: sigmoid(4) = 0.982 of the range
EAGER_STEPS = 3  # real steps before a CUDA graph is recorded, which warm up every library
KEY_SITE = "self_attn.key_site"
# The module of a layer that holds the buffers of each site.
INPUT_QUANT = {
    "attention": f"{ATTENTION_NORM}.input_quant",
    "mlp": f"{MLP_NORM}.input_quant",
    "down": "mlp.down_proj.input_quant",
    "o": "self_attn.o_proj.input_quant",
    "value": "self_attn.v_proj.input_quant",
    "key": f"{KEY_SITE}.input_quant",
}
# Tensors of a state that exist in the weights alone.
MERGED = (("attention", "scale"), ("mlp", "scale"), ("down", "scale"), ("value", "left"))


class LayerParameters(Protocol):
    """What is learned of a layer. Implementations are nn.Modules."""

    def state(self) -> State:
        """The state of the layer as a differentiable function of the parameters, with inverses; in the wide dtype."""

    def transforms(self) -> list[nn.Parameter]:
        """The parameters that have the plain learning rate."""

    def clips(self) -> list[nn.Parameter]:
        """The parameters that have `CLIP_LR` times the learning rate."""

    def start_epoch(self, progress: float) -> None:
        """Called before each epoch with the share of the epochs that is over."""


class TrainedLayerMethod(Method):
    """A method whose states are learned by `fit`; a subclass says which parameters a layer has."""

    settings_prefix = "flat_"
    sets_weight_ranges = True

    def parameters(self, task: LayerTask, largest: dict[str, Tensor]) -> LayerParameters:
        """The parameters of a layer at their start, in the dtype of `task.hidden`.

        largest: of the input of each site, the largest |x| of each channel.
        """
        raise NotImplementedError

    def learn_layer(self, task: LayerTask) -> tuple[State, Figures]:
        """Figures: the loss of the first and last epoch, relative to what the layer adds to the residual stream."""
        m = self.config.methods
        schedule = Schedule(m.flat_epochs, m.flat_batch_size, m.flat_lr, self.config.quantize.seed)
        largest, outputs = maxima(task)
        parameters = self.parameters(task, largest)
        figures = fit(task, outputs, parameters, self.sites, self.weight_options, self.dtype, schedule)
        state = parameters.state()
        return {name: t.detach().clone() for name, t in state.items() if not name.endswith(INVERSE)}, figures


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. lr: of the transforms, falling to 0 along a cosine. seed: of the order of sequences."""

    epochs: int
    batch_size: int
    lr: float
    seed: int


def fit(
    task: LayerTask,
    outputs: Tensor,
    parameters: LayerParameters,
    sites: Sites,
    options: dict[str, GPTQOptions],
    products: torch.dtype,
    schedule: Schedule,
) -> Figures:
    """Fit `parameters` to the outputs [n, T, h] of the layer; returns the mean loss of the first and last epoch.

    options: how the weight of each linear is quantised; empty for 16-bit weights. products: dtype of the inputs of linears.
    The loss is the mean square error relative to what the layer adds to the residual stream.

    Raises:
        NumericsError: the loss is not finite.
    """
    student = FakeQuantLayer(task, parameters, sites, options, products)
    power = float((outputs - task.hidden).square().mean())
    n = len(task.hidden)
    steps_per_epoch = -(-n // schedule.batch_size)
    steps = schedule.epochs * steps_per_epoch
    groups = [(parameters.transforms(), 1.0), (parameters.clips(), CLIP_LR)]

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return (student(hidden) - target).square().mean() / power

    stepper = Stepper(loss, groups, student.runner.device)
    losses = []
    for epoch in range(schedule.epochs):
        parameters.start_epoch(epoch / schedule.epochs)
        total = torch.zeros((), dtype=task.hidden.dtype, device=task.hidden.device)
        of_epoch = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        batches = [batch_indices(step, schedule.batch_size, n, schedule.seed) for step in of_epoch]
        # On the device at once: the host would wait for each batch to be handed over, and the device for the host after it.
        for step, indices in zip(of_epoch, torch.tensor(batches, device=outputs.device), strict=True):
            lr = schedule.lr * (1 + math.cos(math.pi * step / steps)) / 2
            total += stepper.step(task.hidden[indices], outputs[indices], lr)
        losses.append(float(total) / steps_per_epoch)
        if not math.isfinite(losses[-1]):
            raise NumericsError(f"layer {task.index}: the loss is {losses[-1]}", "lower methods.flat_lr")
    return {"first_loss": losses[0], "last_loss": losses[-1]}


class FakeQuantLayer:
    """A layer with fake-quantised weights and activations, as a function of its parameters."""

    def __init__(
        self,
        task: LayerTask,
        parameters: LayerParameters,
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
        self.tensor_names = {name for name, _ in (*self.layer.named_buffers(), *self.layer.named_parameters())}

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [batch, T, h] through the layer, to the same shape."""
        return torch.func.functional_call(self.layer, self._tensors(), (hidden,), self.context)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer that the parameters decide, by their names in it."""
        state = self.parameters.state()
        weights = merged(self.weights, state, self.shape)
        tensors = {}
        for name, w in weights.items():
            role, _, kind = name.rpartition(".")
            if role in self.options and kind == "weight":
                w = self._rounded(role, w, state)
            if role in (ATTENTION_NORM, MLP_NORM):
                tensors[f"{role}.norm.{kind}"] = w
            else:
                wrapped = f"{role}.linear.{kind}"
                tensors[wrapped if wrapped in self.tensor_names else name] = w.to(self.products)
        for name, tensor in state.items():
            site, _, kind = name.removesuffix(INVERSE).rpartition(".")
            if site == "key" and kind == "left":
                tensors[f"{KEY_SITE}.{'inverse' if name.endswith(INVERSE) else kind}"] = tensor
            elif site in INPUT_QUANT and (site, kind) not in MERGED and not name.endswith(INVERSE):
                tensors[f"{INPUT_QUANT[site]}.{kind}"] = tensor
        # functional_call passes over names that the layer does not have, and the tensor would silently have no effect.
        unknown = tensors.keys() - self.tensor_names
        assert not unknown, f"the layer has no {', '.join(sorted(unknown))}"
        return tensors

    def _rounded(self, role: str, w: Tensor, state: State) -> Tensor:
        """The weight [out, in] of a linear, fake-quantised."""
        o = self.options[role]
        if (shrink := state.get(f"{role}.shrink")) is None:
            one = torch.ones((), dtype=w.dtype, device=w.device)
            return clipped_quantize(w, (one, one), o.bits, symmetric=o.symmetric, group_size=o.group_size)
        low, high = shrink.unbind()
        return clipped_quantize(w, (low, high), o.bits, symmetric=o.symmetric, group_size=o.group_size, even=True)


class Stepper:
    """AdamW steps; on a GPU a replayed CUDA graph, because a step is a thousand small kernels.

    loss: of a batch, a function of two tensors whose shapes never change. groups: lists of parameters, each with the factor
    by which its learning rate is multiplied.
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
        self.learning_rates = [torch.tensor(0.0, device=device) for _ in groups]
        param_groups = [{"params": group, "lr": lr} for (group, _), lr in zip(groups, self.learning_rates, strict=True)]
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(param_groups, weight_decay=0.0, capturable=cuda)
        self.uses_graph = cuda
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, hidden: Tensor, target: Tensor, lr: float) -> Tensor:
        """One optimizer step on a batch; its loss before the step, a scalar on the device."""
        for tensor, factor in zip(self.learning_rates, self.factors, strict=True):
            tensor.fill_(lr * factor)
        self.count += 1
        if not self.uses_graph:
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
                    self.graph_loss = self._step(self.hidden, self.target)
            except RuntimeError as error:  # a library that cannot be recorded costs speed, no result
                warnings.warn(f"no CUDA graph ({str(error).splitlines()[0]}): slower", stacklevel=2)
                self.uses_graph = False
                return self._step(hidden, target)
            self.graph = graph
        else:
            self.hidden.copy_(hidden)
            self.target.copy_(target)
        self.graph.replay()
        return self.graph_loss

    def _step(self, hidden: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(hidden, target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def clip_logits(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """A parameter of this shape, with the dtype and device of `like`, whose sigmoid is a clip ratio."""
    return nn.Parameter(torch.full(shape, CLIP_START, dtype=like.dtype, device=like.device))


class WeightClips(nn.Module):
    """Learned clip ratios of the rows of every linear, or of their groups (learnable weight clipping of OmniQuant)."""

    def __init__(self, weights: dict[str, Tensor], options: dict[str, GPTQOptions], like: Tensor) -> None:
        super().__init__()
        self.roles = [role for role in LAYER_LINEARS if role in options]
        shapes = []
        for role in self.roles:
            rows, columns = weights[f"{role}.weight"].shape
            o = options[role]
            # A symmetric grid has one bound, an asymmetric one has two.
            shapes.append((1 if o.symmetric else 2, rows, columns // (o.group_size or columns), 1))
        self.logits = nn.ParameterList([clip_logits(shape, like) for shape in shapes])

    def state(self) -> State:
        """ROLE.shrink of every linear, [2, out, groups, 1]."""
        return {
            f"{role}.shrink": torch.sigmoid(logits).expand(2, -1, -1, -1)
            for role, logits in zip(self.roles, self.logits, strict=True)
        }
