"""Ranks as threads of one process, which meet in memory and reach each other by gloo on loopback."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from accdiff_lib.engine.ranks import Ranks

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def on_ranks(count: int, work: Callable[[Ranks], Any], limit: float = 60.0, beats: bool = False) -> list[Any]:
    """What `work(ranks)` gives or raises on each rank; all must be there within `limit` seconds."""
    store = dist.HashStore()
    found: list[Any] = [TimeoutError("it never came back")] * count
    ended: dict[int, str] = {}

    def run(rank: int) -> None:
        ranks = Ranks(store, rank, count, torch.device("cpu"), gone=lambda other: ended.get(other, ""))
        if beats:
            ranks.begin(store)
        try:
            found[rank] = work(ranks)
        except BaseException as error:
            found[rank] = error
        finally:
            ranks.close()
            ended[rank] = "it ended"

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
    return found
