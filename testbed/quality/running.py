"""Computes the pictures that are missing, in parallel, and keeps their results in a file of JSON lines."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from testbed.quality.pictures import Painter
from testbed.quality.tasks import Setup, Task

#: Pictures of the first so many scenes are kept for the contact sheets.
SHOWN = 3

_painter: Painter | None = None  # of a process of the pool


def records(file: Path) -> dict[str, dict[str, Any]]:
    """All kept results by their keys; a line that was cut off is as good as missing."""
    found = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["key"]] = record
    return found


def complete(tasks: Sequence[Task], setup: Setup, jobs: int) -> dict[str, dict[str, Any]]:
    """The results of all tasks by their keys; those not yet in the file are computed and appended."""
    file = setup.out / "results.jsonl"
    known = records(file)
    keys = {task: setup.key(task) for task in tasks}
    missing = [task for task in tasks if keys[task] not in known
               or (task.scene < SHOWN and not setup.picture(task, "result").exists())]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size:
        with file.open("a") as lines:
            lines.write("\n")
    with file.open("a", encoding="utf-8") as lines:
        for record in tqdm(_computed(missing, setup, jobs), total=len(tasks), initial=len(tasks) - len(missing),
                           unit="picture", smoothing=0):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            known[record["key"]] = record
    return {key: known[key] for key in keys.values()}


def _computed(tasks: Sequence[Task], setup: Setup, jobs: int) -> Iterator[dict[str, Any]]:
    """The records of tasks, in the order in which they are finished."""
    if not tasks:
        return
    if jobs == 1:
        _use_one_thread()
        painter = Painter(setup)
        for task in tasks:
            yield painter(task, keep=task.scene < SHOWN)
        return
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn"), _start, (setup,))
    try:
        for future in as_completed([pool.submit(_paint, task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    """Tiny networks gain nothing from threads, and processes that have several wait for each other."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _start(setup: Setup) -> None:
    global _painter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use_one_thread()
    _painter = Painter(setup)


def _end_with_parent() -> None:
    """A killed parent leaves no process behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _paint(task: Task) -> dict[str, Any]:
    assert _painter is not None
    return _painter(task, keep=task.scene < SHOWN)
