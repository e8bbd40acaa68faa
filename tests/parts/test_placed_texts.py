"""A text that was made longer, so that it fits into a batch with a longer one, and is replaced in windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from accdiff_lib.parts.neighbourhood import Neighbourhood, PlacedTexts, neighbouring


class Layer(nn.Module):
    """Cross-attention."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, context, context)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = Layer()


@pytest.mark.parametrize("behind", ["nothing", "an empty text", "itself", "itself twice"])
def test_the_same_text_everywhere_changes_nothing(behind):
    random = torch.Generator().manual_seed(0)
    x, text, empty = (torch.randn(*shape, generator=random) for shape in ((2, 24, 8), (3, 8), (3, 8)))
    longer = {"nothing": text, "an empty text": torch.cat([text, empty, empty]),
              "itself": torch.cat([text, text]), "itself twice": torch.cat([text, text, text])}[behind]
    context = torch.stack([torch.randn(longer.shape, generator=random), longer])
    block, seen = Block(), Neighbourhood((4, 6), 4)
    plain = block.attn2(x, context)
    numbers = [number % 2 for number in range(len(seen.windows))]
    with neighbouring([block], seen, PlacedTexts(text, [text, text], numbers)):
        torch.testing.assert_close(block.attn2(x, context), plain)
    with neighbouring([block], seen, PlacedTexts(text, [text, empty], numbers)):
        found = block.attn2(x, context)
    assert found[0].equal(plain[0]) and not found[1].allclose(plain[1])
