"""`python -m accdiff_lib batch`: from a file of jobs to a folder of pictures.

All jobs are checked before any is begun. Exit codes: 0 all pictures are there, 1 not all, 2 bad input, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any

from accdiff_lib.command.process import Stop, lasting_streams
from accdiff_lib.command.run import DONE, LESS, answered
from accdiff_lib.errors import InputError
from accdiff_lib.many import arguments, jobs
from accdiff_lib.many.ledger import Ledger
from accdiff_lib.many.local import Pool
from accdiff_lib.many.tasks import Task, price, tasks

#: So many jobs take a while to be checked.
MANY = 500

#: Makes the workers of a run.
MakePool = Callable[[argparse.Namespace, int], Pool]


def main(argv: Sequence[str], stop: Stop | None = None, make_pool: MakePool | None = None) -> int:
    """Runs the command with what follows `batch`; returns its exit code. A `stop` that is given has been entered."""
    told: dict[str, Any] = {}
    with lasting_streams(), nullcontext(stop) if stop else Stop() as stop:
        try:
            return answered(lambda: _run(argv, stop, told, make_pool or _pool), told, stop)
        finally:
            if told and "--json" in argv:
                print(json.dumps(told), flush=True)


def _run(argv: Sequence[str], stop: Stop, told: dict[str, Any], make_pool: MakePool) -> int:
    given, common = arguments.read(argv)
    flag = "JOBS" if given.prompts is None else "--prompts"
    lines = jobs.read(given.jobs or given.prompts, flag)
    ledger = Ledger(given.out)
    found, same = tasks(lines, common, ledger.chance)
    devices = _devices(given)
    _check_folder(given, common)
    if len(lines) >= MANY:
        print(f"checking {len(lines)} jobs ...", file=sys.stderr)
    price(found, common)
    # From here on nothing is refused.
    if given.status:
        return _status(given, found, ledger, told)
    if given.dry_run:
        return _dry_run(given, found, same, ledger, told, len(devices))
    if same:
        print(f"note: {same} more pictures are the same as others, and made once", file=sys.stderr)
    begin = time.perf_counter()
    try:
        ledger.open()
        if given.overwrite:
            ledger.anew()
        drawn, _ = tasks(lines, common, ledger.chance)
        if [task.name for task in drawn] != [task.name for task in found]:  # another program has drawn the seeds
            found = drawn
            price(found, common)
    except OSError as error:
        raise InputError(f"--out: cannot write to {given.out} ({error.strerror or error}); it takes a folder you may "
                         "write to") from error
    with closing(ledger):
        return _make(given, common, found, ledger, stop, told, lambda: make_pool(given, len(devices)), begin)


def _make(given: argparse.Namespace, common: argparse.Namespace, found: Sequence[Task], ledger: Ledger, stop: Stop,
          told: dict[str, Any], make_pool: Callable[[], Pool], begin: float) -> int:
    from accdiff_lib.many.driver import Driver
    from accdiff_lib.many.report import Report

    there = ledger.done([task.name for task in found])
    todo = [task for task in found if task.name not in there]
    ledger.tidy(there)
    with closing(Report(len(found), len(there), sum(task.tflop for task in todo), as_json=given.json)) as report:
        whole = not todo
        driver = None
        if todo:
            with stop.working(), closing(make_pool()) as pool:
                driver = Driver(todo, common, ledger, pool, report, stop, retry=given.retry,
                                overwrite=given.overwrite, sign=ledger.sign if given.ray else "")
                whole = driver.run()
        if whole:
            ledger.tidy([task.name for task in found])
            ledger.complete()
    told |= {"pictures": len(found), "there": len(there), "made": report.made_here, "failed": report.failures,
             "left": report.left, "seconds": round(time.perf_counter() - begin, 3)}
    if driver is not None and driver.full:
        told["error"] = driver.full
    there_now = len(found) - report.left - report.failures
    failed = f", {report.failures} failed (see {given.out}/failed.jsonl)" if report.failures else ""
    print(f"{there_now} of {len(found)} pictures are in {given.out}/{failed}"
          + (f"; the same command makes the other {report.left}" if report.left else ""), file=sys.stderr)
    if stop.asked and not whole:
        return stop.code
    return DONE if whole else LESS


def _status(given: argparse.Namespace, found: Sequence[Task], ledger: Ledger, told: dict[str, Any]) -> int:
    from accdiff_lib.many import report

    there = ledger.done([task.name for task in found])
    state, text = report.status([task for task in found if task.name not in there], len(there), ledger.at_work(),
                                ledger.failures(), ledger.speeds())
    if given.json:
        told |= state
    else:
        print(text)
    return DONE if len(there) == len(found) else LESS


def _dry_run(given: argparse.Namespace, found: Sequence[Task], same: int, ledger: Ledger, told: dict[str, Any],
             workers: int) -> int:
    from accdiff_lib.command.job import device_named
    from accdiff_lib.many import report, speed

    there = set() if given.overwrite else ledger.done([task.name for task in found])
    device = device_named(given.devices[0] if given.devices else "auto")
    costs, text = report.costs([task for task in found if task.name not in there], len(there), same, ledger.speeds(),
                               (speed.device_name(device), speed.of_a_product(device)), workers)
    if given.json:
        told |= {**costs, "dry_run": True}
    else:
        print(text)
    return DONE


def _check_folder(given: argparse.Namespace, common: argparse.Namespace) -> None:
    from pathlib import Path

    from accdiff_lib.command.folder import Folder

    Folder(given.out).check(0)
    if getattr(common, "spare", None) is not None:
        Folder(Path(common.spare).expanduser(), "--spare").check(0)


def _devices(given: argparse.Namespace) -> list[str]:
    """Where each worker runs, by name; on a cluster how many there shall be at most. Raises InputError."""
    if given.ray is not None:
        from accdiff_lib.many.cluster import check

        check()
        return ["auto"] * (given.workers or 1)
    import torch

    from accdiff_lib.command.job import device_named

    names = given.devices or [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["auto"]
    for name in names:
        try:
            device_named(name)
        except InputError as error:
            raise InputError(str(error).replace("--device:", "--devices:")) from None
    count = given.workers or len(names)
    return [names[number % len(names)] for number in range(count)]


def _pool(given: argparse.Namespace, workers: int) -> Pool:
    if given.ray is not None:
        from accdiff_lib.many.cluster import Cluster

        return Cluster(given.ray, given.workers)
    from accdiff_lib.many.local import Local

    return Local(_devices(given))
