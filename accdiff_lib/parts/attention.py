"""Records a UNet's cross-attention maps in the base pass, without changing the picture (docs/methods.md, 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def map_size(height: int, width: int, halvings: int) -> tuple[int, int]:
    """(rows, columns) of the maps of a latent of height x width cells, which the UNet halves so often, rounding up."""
    for _ in range(halvings):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


class AttentionRecorder:
    """Sums the attention of every image cell to every text token over layers, heads and model calls.

    A context manager: inside it, hooks on the cross-attention layers read what goes in and compute the probabilities
    themselves, so the maps are the same whichever attention implementation the UNet uses, and the UNet's own result is
    untouched. Layers whose image tokens are not those of the maps' level are left alone.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], size: tuple[int, int],
                 cond_rows: Callable[[int], slice]):
        """`layers` by name, the maps' (rows, columns), and which rows of a UNet batch are conditional."""
        self.size = size
        self._layers = layers
        self._cond_rows = cond_rows
        self._handles: list[Any] = []
        self._sum: Tensor | None = None
        self._count = 0
        #: Layers that the running evaluation has recorded, and what was there before it; None outside of one.
        self._seen: set[nn.Module] | None = None
        self._before: tuple[Tensor | None, int] = None, 0

    def __enter__(self) -> AttentionRecorder:
        self._handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for _, layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around one evaluation of the model. Where it is tried again (memory ran out in the middle of it) the last
        try counts, and nothing if it fails."""
        self._seen, self._before = set(), (self._sum, self._count)
        try:
            yield
        except BaseException:
            self._sum, self._count = self._before
            raise
        finally:
            self._seen, self._before = None, (None, 0)

    @property
    def recorded(self) -> bool:
        """Whether any layer had maps of this size."""
        return self._sum is not None

    @property
    def maps(self) -> Tensor:
        """The mean attention [images, rows, columns, tokens], float32 on the CPU; over the tokens it sums to 1.

        Raises RuntimeError when no layer had this size.
        """
        if self._sum is None:
            raise RuntimeError(f"no cross-attention layer of the model has maps of {self.size[1]}x{self.size[0]} cells")
        return (self._sum / self._count).reshape(-1, *self.size, self._sum.shape[-1]).cpu()

    def state(self) -> dict[str, Tensor]:
        """All that was recorded so far."""
        return {} if self._sum is None else {"sum": self._sum, "count": torch.tensor(self._count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from that, also within an evaluation, which then began with it."""
        self._before = self._sum, self._count = state["sum"], int(state["count"])

    def _record(self, layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        image, text = _inputs(args, kwargs)
        if text is None or image.ndim != 3 or image.shape[1] != self.size[0] * self.size[1]:
            return
        rows = self._cond_rows(image.shape[0])
        image, text = image[rows], text[rows]
        if not len(image):  # a call for the unconditional rows alone
            return
        with torch.no_grad():
            probabilities = attention_probabilities(layer, image, text)
            total = probabilities.sum(dim=1)
        if self._seen is not None:
            if layer in self._seen:
                self._sum, self._count = self._before
                self._seen.clear()
            self._seen.add(layer)
        self._sum = total if self._sum is None else self._sum.to(total.device) + total
        self._count += probabilities.shape[1]


def _inputs(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The image tokens and the text tokens of an attention layer's call, however it names them."""
    image = args[0] if args else next(kwargs[name] for name in ("hidden_states", "x") if name in kwargs)
    named = next((kwargs[name] for name in ("encoder_hidden_states", "context") if name in kwargs), None)
    return image, args[1] if named is None and len(args) > 1 else named


def attention_probabilities(layer: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of one cross-attention layer: [B, heads, image tokens, text tokens], float32."""
    query, key = layer.to_q(image), layer.to_k(text)  # type: ignore[operator]
    heads = int(layer.heads)  # type: ignore[arg-type]
    query, key = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
    scale = query.shape[-1] ** -0.5
    with torch.autocast(query.device.type, enabled=False):  # in which WebUIs run a base pass; it would round these
        return (query @ key.transpose(-1, -2) * scale).softmax(dim=-1)
