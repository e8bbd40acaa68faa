"""What fails in a registration is said in one line of the log and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def guarded(what: str, register: Callable[..., Any]) -> Callable[..., None]:
    """A callback that registers `what`, or says why it could not."""
    def callback(*args: Any, **kwargs: Any) -> None:
        try:
            register(*args, **kwargs)
        except Exception as error:
            print(f"[AccDiffusion] has no {what} in this WebUI: {type(error).__name__}: {error}")
    return callback
