"""Other devices that help with a picture: each has a copy of the networks and a thread, and evaluates a share.

A helper decides nothing: what is evaluated together does not depend on how many there are, and one that fails is left
out, its share evaluated by the picture's own device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.shares import Gaining, Speeds
from accdiff_lib.engine.spread import check_stop
from accdiff_lib.errors import CannotHelp, OutOfMemory, is_out_of_memory

if TYPE_CHECKING:
    from accdiff_lib.engine.host import Progress

T = TypeVar("T")

#: Evaluates a part of a call on a device; what it gives lies where the call's tensors do.
Evaluate = Callable[[Any], Tensor]

#: Latents that all devices together get at a time: so many that the faster ones can have more of them.
ROUND = 32
#: By how much (relative, of the root mean square) a copy may differ from the network: rounding on another kind of
#: device, by precision.
ROUNDING = {torch.bfloat16: 2 ** -5}
_ROUNDING = 2 ** -7

#: The picture's own device among the workers.
_OWN = 0


class Helper:
    """A device that may help."""

    def __init__(self, name: str, device: torch.device, make: Callable[[], Evaluate]) -> None:
        """`make` copies the networks to the device; it raises what is to be said where that cannot be."""
        self.name, self.device = name, device
        self._make = make
        self._evaluate: Evaluate | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="accdiff-helper", initializer=_settle,
                                          initargs=(device,))
        #: It has given what the network gives.
        self.tried = False

    def begin(self, modes: Modes) -> Future[None]:
        """Copies the networks, if that is not done."""
        return self._thread.submit(modes.within, self._begin)

    def _begin(self) -> None:
        if self._evaluate is None:
            self._evaluate = self._make()

    def share(self, modes: Modes, parts: Sequence[Any], progress: Progress) -> Future[tuple[list[Tensor], float]]:
        """Evaluates parts; see `_evaluated`."""
        assert self._evaluate is not None
        return self._thread.submit(modes.within, _evaluated, self._evaluate, parts, self.device, progress)

    def end(self) -> None:
        """Lets go of the copies."""
        self._thread.shutdown(wait=True)
        self._evaluate = None


class Helpers(Gaining):
    """Those of a run, and which evaluates what. Close it at the end."""

    def __init__(self, helpers: Sequence[Helper]) -> None:
        #: By number those that are there; 0 is the picture's own device.
        self._there = dict(enumerate(helpers, _OWN + 1))
        self._speeds = Speeds()
        #: How many latents each device evaluates at once in the call that is divided now; 0 outside of one.
        self.size = 0

    @property
    def devices(self) -> int:
        """How many devices make the picture."""
        return 1 + len(self._there)

    def at_once(self, size: int) -> int:
        """How many latents a call gets that is divided into parts of `size`."""
        return size if not self._there else size * self.devices * max(1, ROUND // (size * self.devices))

    @contextmanager
    def dividing(self, size: int) -> Iterator[None]:
        """Within it calls are divided into parts of `size` latents."""
        self.size = size
        try:
            yield
        finally:
            self.size = 0

    def evaluate(self, own: Evaluate, parts: Sequence[Any], counts: Sequence[int], kind: Hashable,
                 device: torch.device, progress: Progress) -> list[Tensor]:
        """What evaluating the parts gives, each of so many latents of a kind; `own` does it on the picture's `device`.

        Raises Interrupted or Skipped between two parts, and whatever `own` raises.
        """
        begin, modes = time.perf_counter(), Modes()
        self._begin(modes, progress)
        shares = self._speeds.shares([(kind, count) for count in counts], [_OWN, *self._there])
        running = {number: helper.share(modes, [parts[each] for each in shares[number]], progress)
                   for number, helper in self._there.items()}
        try:
            heard = {_OWN: _evaluated(own, [parts[each] for each in shares[_OWN]], device, progress)}
        finally:
            wait(running.values())  # whatever happened here, nobody goes on behind our back
        for number, future in running.items():
            error = future.exception()
            if error is None:
                heard[number] = future.result()
            else:
                self._leave_out(number, error, progress)
        check_stop(progress)
        found = {part: made for number, (all_made, _) in heard.items()
                 for part, made in zip(shares[number], all_made, strict=False)}
        self._try(own, parts, shares, found, progress)
        missing = [number for number in range(len(parts)) if number not in found]
        found.update(zip(missing, _evaluated(own, [parts[each] for each in missing], device, progress)[0],
                         strict=False))
        check_stop(progress)
        self._speeds.learn(kind, {number: (seconds, sum(counts[each] for each in shares[number]))
                                  for number, (_, seconds) in heard.items()})
        self.busy += sum(seconds for _, seconds in heard.values())
        self.took += time.perf_counter() - begin
        return [found[number] for number in range(len(parts))]

    def _begin(self, modes: Modes, progress: Progress) -> None:
        """Copies the networks, the first time."""
        for number, future in {number: helper.begin(modes) for number, helper in self._there.items()}.items():
            error = future.exception()
            if error is not None:
                self._leave_out(number, error, progress)

    def _try(self, own: Evaluate, parts: Sequence[Any], shares: Mapping[int, Sequence[int]],
             found: dict[int, Tensor], progress: Progress) -> None:
        """Looks whether those that are new give what the network gives; of others nothing counts."""
        for number, helper in list(self._there.items()):
            first = next((part for part in shares.get(number, ()) if part in found), None)
            if helper.tried or first is None:
                continue
            expected = own(parts[first])
            if not expected.isfinite().all():
                continue  # which says nothing
            helper.tried = True
            if not alike(found[first], expected):
                for part in shares[number]:
                    found.pop(part, None)
                self._leave_out(number, CannotHelp("what another extension does to the model cannot be copied"),
                                progress)

    def _leave_out(self, number: int, error: BaseException, progress: Progress) -> None:
        helper = self._there.pop(number)
        why = _reason(error)
        error.__traceback__ = None  # which keeps tensors
        helper.end()
        memory.release()
        count = f"{self.devices} devices" if self._there else "one device"
        progress.comment(f"{helper.name} does not help ({why}); the picture is made on {count}")

    def close(self) -> None:
        """Lets go of all copies."""
        for helper in self._there.values():
            helper.end()
        if self._there:
            self._there.clear()
            memory.release()


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether two predictions are the same but for rounding."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    most = ROUNDING.get(first.dtype, _ROUNDING)
    first, second = first.float(), second.float()
    return bool((first - second).square().mean() <= most ** 2 * second.square().mean())


def _evaluated(evaluate: Evaluate, parts: Sequence[Any], device: torch.device,
               progress: Progress) -> tuple[list[Tensor], float]:
    """The predictions of parts, as far as nobody stops it, and the seconds that they took."""
    begin, made = time.perf_counter(), []
    for part in parts:
        if progress.interrupted or progress.skipped:
            break
        made.append(evaluate(part))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made, time.perf_counter() - begin


def _reason(error: BaseException) -> str:
    """Why a helper is left out, in a line."""
    if isinstance(error, OutOfMemory | CannotHelp):
        return str(error)
    if isinstance(error, Exception) and is_out_of_memory(error):
        return "its memory does not suffice"
    return " ".join([f"{type(error).__name__}:", *str(error).split("\n", 1)[0].split()])


def _settle(device: torch.device) -> None:
    """What a thread does first: whatever names no device works on this one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Modes:
    """How this thread computes: what torch keeps for each thread by itself."""

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [(kind, dtype) for kind, on, dtype in _autocasts() if on]

    def within(self, work: Callable[..., T], *args: Any) -> T:
        """`work(*args)` in another thread, computed as in this one; without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.no_grad())  # behind the other, which switches gradients on
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            return work(*args)


def _autocasts() -> Iterator[tuple[str, bool, torch.dtype]]:
    """Of each kind of device, whether this thread is within torch.autocast, and of which dtype."""
    if hasattr(torch, "get_autocast_dtype"):
        for kind in ("cuda", "cpu"):
            yield kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    else:  # before torch 2.4
        yield "cuda", torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
        yield "cpu", torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
