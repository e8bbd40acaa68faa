"""Numbers that are not numbers: found in the call that made them, named, and computed once more in a wider precision.

A NaN that goes on spoils the whole picture, and then the VAE is blamed. So every prediction is reduced to one flag
where it lies. It is read together with the sampler's noise level, which must be looked at once in every call anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from accdiff_lib.errors import NotFinite, is_out_of_memory

if TYPE_CHECKING:
    from accdiff_lib.engine.host import Host
    from accdiff_lib.engine.spread import Batcher

#: `predict(x, sigma, control)`: the prediction of `x`, which it may rewrite, at the noise level `sigma` (a scalar
#: tensor on the CPU, so that nobody waits for the device), with the ControlNet or without it.
Predict = Callable[[Tensor, Tensor, bool], Tensor]


class Finite:
    """Watches the predictions of a part of a run. A context manager: within it the host may come to compute in a wider
    precision; afterwards, for the next part, it does not."""

    def __init__(self, host: Host, batcher: Batcher | None = None) -> None:
        """`batcher` evaluates the predictions' latents, and counts them."""
        self._host, self._batcher = host, batcher
        self._widened = ExitStack()

    def __enter__(self) -> Finite:
        return self

    def __exit__(self, *_: object) -> None:
        self._widened.close()

    def prediction(self, predict: Predict, x: Tensor, sigma: Tensor, expected: float, where: str, *,
                   control: bool = False) -> Tensor:
        """The prediction of `x` at the sampler's `sigma` (a scalar tensor), which is the `expected` one, without NaN.

        `where` ("at step 3 of 2x") is for messages; `control` says whether the ControlNet takes part. From the first
        NaN to the end of the part the host computes in the next wider precision. Raises NotFinite where that does
        not help, RuntimeError where the noise level is another, and what `predict` raises.
        """
        level, before = torch.tensor(expected, dtype=sigma.dtype), x.clone()
        found = predict(x, level, control)
        actual, finite = torch.stack([sigma, found.isfinite().all().to(sigma)]).tolist()
        if abs(actual - expected) > 1e-3 * expected:
            raise RuntimeError(f"the sampler left its script: sigma {actual:g} instead of {expected:g}")
        if not finite:
            with self._uncounted():
                found = self._again(lambda x, control: predict(x, level, control), x, before, where, control)
        return found

    def _again(self, predict: Callable[[Tensor, bool], Tensor], x: Tensor, before: Tensor, where: str,
               control: bool) -> Tensor:
        """The prediction in the next wider precision; `before` is what `x` was."""
        if not before.isfinite().all():
            raise NotFinite(f"the sampler made NaN before the model was called {where}; another one may not")
        guilty = control and bool(predict(before.clone(), False).isfinite().all())
        network = "ControlNet" if guilty else "UNet"
        what = f"the {network} made NaN {where}"
        wider = self._host.wider()
        if wider is None:
            self._give_up(what, network)
        try:
            precision = self._widened.enter_context(wider)
            found = predict(x.copy_(before), control)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._give_up(f"{what}, and there is no memory to compute it in a wider precision", network)
        if not found.isfinite().all():
            self._give_up(f"{what}, in {precision} too", network)
        self._host.progress.comment(f"{what}; from there on it computes in {precision}")
        return found

    def _give_up(self, what: str, network: str) -> NoReturn:
        raise NotFinite(f"{what}: {self._host.advice(network)}") from None

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """What is evaluated a second time is not progress."""
        if self._batcher is None:
            yield
            return
        self._batcher.counts = False
        try:
            yield
        finally:
            self._batcher.counts = True


def broken_weight(network: nn.Module) -> str:
    """The name of the first weight with NaN or infinite values; empty where there is none, or none that can be read."""
    for name, weight in network.named_parameters():
        try:
            if weight.is_floating_point() and not weight.detach().float().isfinite().all():
                return name
        except (RuntimeError, NotImplementedError):  # in a storage of its own
            continue
    return ""


def advice(network: nn.Module | None, name: str, precise: str) -> str:
    """What a user can do where a network (None: of which nothing is known) makes NaN; `precise` is how to give it a
    wider precision, empty where it has the widest."""
    broken = "" if network is None else broken_weight(network)
    if broken:
        return f"its weights are broken ({broken}), as a bad merge leaves them; take another {name}"
    other = f"another {name}" + (", or smaller weights in the prompt" if name == "checkpoint" else "")
    return f"{precise} may help, or {other}" if precise else f"{other} may help"
