"""Decoder layers whose norms are not those of Llama: on the outputs of attention and MLP, on both sides, or one for both.

Here they have Llama's two places in front of attention and MLP, and two more behind them, whatever a family calls its norms:
sites, calibration and merging then know one layer. A place without a norm is the identity.
"""

from typing import Any

from torch import Tensor, nn

ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
OUTPUT_NORMS = ATTENTION_OUTPUT_NORM, MLP_OUTPUT_NORM = "attention_output_norm", "mlp_output_norm"

# Where norms stand (`families.Family.norms`) -> our name of each place -> the family's name of the norm there.
PLACES: dict[str, dict[str, str]] = {
    "before": {ATTENTION_NORM: ATTENTION_NORM, MLP_NORM: MLP_NORM},
    "around": {
        ATTENTION_NORM: "input_layernorm",
        ATTENTION_OUTPUT_NORM: "post_attention_layernorm",
        MLP_NORM: "pre_feedforward_layernorm",
        MLP_OUTPUT_NORM: "post_feedforward_layernorm",
    },
    "after": {
        ATTENTION_OUTPUT_NORM: "post_attention_layernorm",
        MLP_OUTPUT_NORM: "post_feedforward_layernorm",
    },
    "shared": {ATTENTION_NORM: "input_layernorm", MLP_NORM: "input_layernorm"},
}


def name_here(norms: str, name: str) -> str:
    """Our name of a parameter `name` as checkpoints store it, of a family whose norms stand as `norms` says."""
    module, _, kind = name.rpartition(".")
    owner, _, norm = module.rpartition(".")
    # The first of our names, where two places share a norm.
    ours = next((place for place, stored in PLACES[norms].items() if stored == norm), norm)
    return f"{owner}.{ours}.{kind}" if name.startswith("model.layers.") and ours != norm else name


def name_in_checkpoints(norms: str, name: str) -> str:
    """The reverse of `name_here`, for a name within a layer."""
    module, _, kind = name.rpartition(".")
    return f"{PLACES[norms].get(module, module)}.{kind}"


class OutputNormLayer(nn.Module):
    """A decoder layer made of another one's attention, MLP and norms.

    x + N2(attention(N1 x)), then x + N4(mlp(N3 x)); with a shared norm N1 = N3 both read the same x.
    """

    def __init__(self, layer: Any, norms: str) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.parallel = layer.self_attn, layer.mlp, norms == "shared"
        for place in (ATTENTION_NORM, ATTENTION_OUTPUT_NORM, MLP_NORM, MLP_OUTPUT_NORM):
            stored = PLACES[norms].get(place)
            setattr(self, place, nn.Identity() if stored is None else getattr(layer, stored))

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """hidden_states [batch, T, h] to the same; context: what the family's attention takes beside them."""
        norms: Any = self
        attended, _ = self.self_attn(hidden_states=norms.input_layernorm(hidden_states), **context)
        after = hidden_states + norms.attention_output_norm(attended)
        read = hidden_states if self.parallel else after
        output: Tensor = after + norms.mlp_output_norm(self.mlp(norms.post_attention_layernorm(read)))
        return output
