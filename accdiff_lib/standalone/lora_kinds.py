"""What a LoRA adds to a layer's weight, by the tensors that it has for it, whatever kind of LoRA it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: What a tensor is to its layer, by how its name ends, where that is not one word.
ROLES = {
    **{f"{ending}.weight": "down" for ending in ("lora_down", "lora_A", "lora_A.default", "lora.down",
                                                 "lora_linear_layer.down")},
    **{f"{ending}.weight": "up" for ending in ("lora_up", "lora_B", "lora_B.default", "lora.up",
                                               "lora_linear_layer.up")},
    "lora_mid.weight": "mid", "w_norm": "diff", "b_norm": "diff_b",
}
#: What any kind may have.
_COMMON = {"alpha", "scale", "dora_scale", "diff_b"}

Tensors = Mapping[str, Tensor]


def _lora(of: Tensors, dim: int | None) -> tuple[Tensor, int | None]:
    """Hu et al. 2021; LoCon for convolutions, and with a core tensor between (CP decomposition)."""
    up, down = of["up"].flatten(1), of["down"]
    if "mid" in of:
        return torch.einsum("nmkl,in,mj->ijkl", of["mid"], up, down.flatten(1)), len(down)
    return up[:, :dim] @ down.flatten(1)[:dim], len(down)


def _loha(of: Tensors, _dim: int | None) -> tuple[Tensor, int | None]:
    """The Hadamard product of two low-rank ones."""
    first, second = (_joined(of[f"hada_w{i}_a"], of[f"hada_w{i}_b"], of.get(f"hada_t{i}")) for i in (1, 2))
    return first * second, len(of["hada_w1_b"])


def _lokr(of: Tensors, _dim: int | None) -> tuple[Tensor, int | None]:
    """The Kronecker product of two that may be low-rank ones."""
    rank = None
    factors = []
    for i in (1, 2):
        if f"lokr_w{i}" in of:
            factors.append(of[f"lokr_w{i}"])
        else:
            rank = len(of[f"lokr_w{i}_b"])
            factors.append(_joined(of[f"lokr_w{i}_a"], of[f"lokr_w{i}_b"], of.get(f"lokr_t{i}")))
    first, second = factors
    if second.ndim == 4 and first.ndim == 2:
        first = first[..., None, None]
    return torch.kron(first, second.contiguous()), rank


def _full(of: Tensors, _dim: int | None) -> tuple[Tensor, int | None]:
    return of["diff"], None


def _joined(first: Tensor, second: Tensor, core: Tensor | None) -> Tensor:
    """The product of two matrices, or with a core tensor between them (Tucker decomposition)."""
    if core is None:
        return first.flatten(1) @ second.flatten(1)
    return torch.einsum("ijkl,jr,ip->prkl", core, second, first)


#: The kinds by the tensors that they must have, and may.
_KINDS: tuple[tuple[set[str], set[str], Callable[[Tensors, int | None], tuple[Tensor, int | None]]], ...] = (
    ({"up", "down"}, {"mid"}, _lora),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}, _loha),
    *(({*first, *second}, {"lokr_t2"}, _lokr) for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
      for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"])),
    ({"diff"}, set(), _full),
)


def difference(weight: Tensor, of: Tensors, *, dim: int | None = None, alpha: float | None = None) -> Tensor:
    """What a LoRA of weight 1 adds to a layer's `weight`: float32, of the same shape.

    `of` are its tensors for the layer, float32, by their role; a LoRA uses the first `dim` of its dimensions; `alpha`
    is for those without a tensor of it. On the meta device it is about shapes alone. Raises ValueError, with the
    reason, for kinds that are not known and shapes that do not fit.
    """
    kind = next((make for must, may, make in _KINDS if must <= of.keys() <= must | may | _COMMON), None)
    if kind is None:
        raise ValueError(f"it is no LoRA, LoCon, LoHa, LoKr or whole difference, but of {', '.join(sorted(of))}")
    try:
        made, rank = kind(of, dim)
        made = made.reshape(weight.shape)
        if "scale" in of:
            made = made * of["scale"].reshape(())
        elif rank and "alpha" in of:
            made = made * (of["alpha"].reshape(()) / rank)
        elif rank and alpha is not None:
            made = made * (alpha / rank)
        return _decomposed(weight.float(), made, of["dora_scale"]) if "dora_scale" in of else made
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in of.items())
        raise ValueError(f"{shapes} for a weight {list(weight.shape)}") from error


def _decomposed(weight: Tensor, made: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (Liu et al. 2024) as LyCORIS has it: the merged weight has these norms by input channel."""
    merged = weight + made
    if magnitude.numel() != merged.shape[1]:
        raise RuntimeError("these are magnitudes by output channel")
    norms = merged.transpose(0, 1).flatten(1).norm(dim=1)
    return merged * (magnitude.flatten() / norms).reshape(1, -1, *[1] * (merged.ndim - 2)) - weight
