"""Union ControlNets (ControlNet++, xinsir 2024): one network for several kinds of hints, used for edges.

For one kind of hint such a network is a plain ControlNet but for two things: a constant, which belongs to the kind, in
the embedding of the timestep; and an offset of each channel of the hint's features, which a small transformer makes of
their mean. As it sees the hint alone, its attention has one token. (The published code lets the pictures of a batch
attend to each other there; alone each gets what it gets here.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.parts.noise_levels import timestep_embedding

#: What `checkpoint.kind` calls them.
KIND = "a union ControlNet"
#: The tensors that plain ControlNets do not have.
OWN = re.compile(r"(task_embedding$|control_add_embedding\.|transformer_layes\.|spatial_ch_projs\.)")
#: The number of the kind of hint "canny, line art, straight lines".
EDGES = 3


class UnionHint(nn.Module):
    """The features of hints of edges [M, C, h, w], with their offset."""

    def __init__(self, embedding: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """`embedding` makes features of hints [M, 3, 8h, 8w]; of `weights` those of OWN are taken."""
        super().__init__()
        self.embedding = embedding
        self.task = nn.Parameter(weights["task_embedding"][EDGES].clone(), requires_grad=False)
        count = len({name.split(".")[1] for name in weights if name.startswith("transformer_layes.")})
        self.layers = nn.ModuleList(_Layer({name.removeprefix(prefix): weight for name, weight in weights.items()
                                            if name.startswith(prefix)})
                                    for prefix in (f"transformer_layes.{number}." for number in range(count)))
        self.out = _linear(weights, "spatial_ch_projs")

    def forward(self, hint: Tensor) -> Tensor:
        features: Tensor = self.embedding(hint)
        token = features.mean(dim=(2, 3)) + self.task
        for layer in self.layers:
            token = layer(token)
        offset: Tensor = self.out(token)
        return features + offset[..., None, None]


class _Layer(nn.Module):
    """A transformer's layer, for a single token [M, C]."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        value = {name: weights[f"attn.in_proj_{name}"].chunk(3)[2] for name in ("weight", "bias")}
        self.value, self.out = _linear(value, ""), _linear(weights, "attn.out_proj")
        self.norms = nn.ModuleList(_norm(weights, name) for name in ("ln_1", "ln_2"))
        self.up, self.down = _linear(weights, "mlp.c_fc"), _linear(weights, "mlp.c_proj")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.value(self.norms[0](x)))
        inner = self.up(self.norms[1](x))
        result: Tensor = x + self.down(inner * torch.sigmoid(1.702 * inner))
        return result


def time_offset(weights: Mapping[str, Tensor]) -> Tensor:
    """The constant of edges in the embedding of the timestep."""
    first, second = (_linear(weights, f"control_add_embedding.linear_{number}") for number in (1, 2))
    kinds = len(weights["task_embedding"])
    one_hot = F.one_hot(torch.tensor(EDGES), kinds).float()
    embedded = timestep_embedding(one_hot, first.in_features // kinds).flatten()
    result: Tensor = second(F.silu(first(embedded.to(first.weight.dtype))))
    return result


def own_weights(names: Mapping[str, object], prefix: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors of OWN of a file with these names, float32; none of a plain ControlNet's."""
    return {name[len(prefix):]: read(name).float() for name in names
            if name.startswith(prefix) and OWN.match(name[len(prefix):])}


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight, bias = (weights[f"{name}.{part}" if name else part] for part in ("weight", "bias"))
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
    return layer.requires_grad_(False)


def _norm(weights: Mapping[str, Tensor], name: str) -> nn.LayerNorm:
    layer = nn.LayerNorm(len(weights[f"{name}.weight"]))
    layer.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
    return layer.requires_grad_(False)
