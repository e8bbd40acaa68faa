"""Many runs in one process, most of which fail or are stopped: hooks, tensors, files, threads and memory stay.

    python -m tests.endurance 300

The command with the embedded model, which is loaded every time, and the stand-in of A1111 with a tiny one, in turn.
Memory is measured when glibc has given back what it keeps free between what is used, some 50 MB. What is in use of its
heaps stays; of what grows in the rest, safetensors 0.8 has 40 kB a load: it never lets go of two numbers for each
tensor that it reads.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from accdiff_lib.command import output
from accdiff_lib.command import run as cli
from accdiff_lib.engine import memory
from accdiff_lib.standalone.host import StandaloneHost
from tests.webui_stand_in.generation import BASE, OPTIONS, WebUI, at_call, started

#: Of the command: 64 px to 80 px.
QUICK = ["a ball on the snow", "--width", "64", "--height", "64", "--steps", "2", "--window", "8", "--scale", "1.25",
         "--no-explain"]
#: The exit code after Ctrl-C.
INTERRUPTED = 130
#: A call of the model in the first stage, of both programs.
STAGE = BASE["steps"] + 2


class Broken(Exception):
    """Of an extension, or of a model."""


def fail(error: BaseException) -> None:
    raise error


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


#: What happens in a call of the model.
FAULTS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "memory runs out once": lambda: fail(RuntimeError("could not create a primitive")),
    "the model fails": lambda: fail(Broken("a bad day")),
    "Ctrl-C": interrupt,
    "Ctrl-C twice": partial(interrupt, 2),
}


@dataclass
class Kept:
    """What a process holds."""

    tensors: int
    hooks: int
    descriptors: int
    threads: int
    #: Bytes of main memory.
    resident: int

    @classmethod
    def now(cls) -> Kept:
        memory.release()
        held = gc.get_objects()
        # By their types: asking some objects for their class makes them warn.
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in held
                    if issubclass(type(module), torch.nn.Module))
        tensors = sum(issubclass(type(each), torch.Tensor) for each in held)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(tensors, hooks, len(os.listdir("/proc/self/fd")), threading.active_count(),
                   pages * os.sysconf("SC_PAGE_SIZE"))

    @property
    def counted(self) -> tuple[int, ...]:
        """What may not grow by one."""
        return self.tensors, self.hooks, self.descriptors, self.threads


# --- the command -----------------------------------------------------------------------------------------------

@contextmanager
def in_call(number: int, fault: Callable[[], None], spoil: float | None = None) -> Iterator[None]:
    """Within it the fault happens in one of the model's calls, or its result is spoilt from there on."""
    denoise, at, calls = StandaloneHost.denoise, at_call(number, fault), []

    def watched(self: Any, *args: Any) -> Any:
        calls.append(1)
        at()
        found = denoise(self, *args)
        return found if spoil is None or len(calls) < number else found * spoil

    with patch.object(StandaloneHost, "denoise", watched):
        yield


def command(call: int, fault: Callable[[], None], code: int, spoil: float | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder, in_call(call, fault, spoil), contextlib.suppress(Broken):
        assert cli.main([*QUICK, "--out", folder]) == code


def full_disk() -> None:
    full = patch.object(output, "write_whole", side_effect=OSError(errno.ENOSPC, "full"))
    with tempfile.TemporaryDirectory() as folder, patch.object(tempfile, "tempdir", folder), full:
        assert cli.main([*QUICK, "--out", folder]) == cli.LESS


# --- the WebUI -------------------------------------------------------------------------------------------------

def generation(webui: WebUI, call: int, act: Callable[[], None], spoil: float | None = None, **changes: Any) -> None:
    unet, calls, at = webui.model.model.diffusion_model, [], at_call(call, act)

    def spoilt(_module: Any, _args: Any, out: Any) -> Any:
        calls.append(1)
        return out if spoil is None or len(calls) < call else out * spoil

    handles = [unet.register_forward_pre_hook(lambda *_: at()), unet.register_forward_hook(spoilt)]
    try:
        with contextlib.suppress(Broken, ArithmeticError, RuntimeError, KeyboardInterrupt):
            webui.generate({**OPTIONS, "stage_steps": 2}, **changes)
    finally:
        for handle in handles:
            handle.remove()


def kinds(webui: WebUI) -> list[Callable[[], None]]:
    """Every kind of run, the two programs in turn."""
    of_command = [partial(command, STAGE, fault, INTERRUPTED if "Ctrl" in name else cli.DONE)
                  for name, fault in FAULTS.items()]
    of_command += [partial(command, 2, FAULTS["Ctrl-C"], INTERRUPTED),
                   partial(command, STAGE, FAULTS["nothing"], cli.LESS, torch.nan),
                   partial(command, 1, FAULTS["nothing"], cli.LESS, torch.inf), full_disk]
    state = webui.state
    of_webui = [partial(generation, webui, STAGE, fault) for name, fault in FAULTS.items() if "Ctrl" not in name]
    of_webui += [partial(generation, webui, call, act) for act in (state.interrupt, state.skip) for call in (2, STAGE)]
    of_webui += [partial(generation, webui, STAGE, FAULTS["nothing"], torch.nan),
                 partial(generation, webui, STAGE, lambda: fail(KeyboardInterrupt()), batch_size=2)]
    return [kind for pair in zip(of_command, of_webui, strict=True) for kind in pair]


def run(count: int, report: Callable[[str], None] = lambda line: None) -> tuple[Kept, Kept]:
    """What the process holds after a finished run of both programs, and after `count` runs more."""
    with started() as webui:
        every = kinds(webui)
        seen: list[Kept] = []

        def look(number: int) -> None:
            quietly(every[1])  # the WebUI holds on to its last generation's texts and preview
            seen.append(Kept.now())
            report(f"{number:4} {seen[-1]}")

        quietly(every[0])
        for number, kind in enumerate(islice(cycle(every), count)):
            if number % 50 == 0:
                look(number)
            quietly(kind)
        look(count)
        return seen[0], seen[-1]


def quietly(kind: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        kind()


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    begun, ended = run(wanted, partial(print, flush=True))
    sys.exit(0 if begun.counted == ended.counted else 1)
