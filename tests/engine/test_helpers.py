"""Helpers: who evaluates what, in which thread and how, and what happens to those that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.helpers import ROUND, Helper, Helpers, alike
from accdiff_lib.engine.host import Unwatched
from accdiff_lib.engine.spread import Batcher, Latents
from accdiff_lib.errors import CannotHelp, Interrupted, OutOfMemory

CPU = torch.device("cpu")


class Progress(Unwatched):
    """Remembers what it is told."""

    interrupted = False

    def __init__(self) -> None:
        self.comments: list[str] = []

    def comment(self, text: str) -> None:
        self.comments.append(text)


def evaluated(part: int) -> Tensor:
    return torch.full((2, 3), float(part))


def helpers(*evaluates: Callable[[int], Tensor] | Exception) -> Helpers:
    def make(evaluate: Callable[[int], Tensor] | Exception) -> Callable[[], Callable[[int], Tensor]]:
        def made() -> Callable[[int], Tensor]:
            if isinstance(evaluate, Exception):
                raise evaluate
            return evaluate
        return made

    return Helpers([Helper(f"GPU {number}", CPU, make(each)) for number, each in enumerate(evaluates, 1)])


def run(found: Helpers, own: Callable[[int], Tensor] = evaluated, parts: int = 8, progress: Any = None) -> list[Tensor]:
    """What all give together for so many parts of one latent."""
    return found.evaluate(own, range(parts), [1] * parts, "kind", CPU, progress or Progress())


def right(found: list[Tensor], parts: int = 8) -> bool:
    return len(found) == parts and all(torch.equal(each, evaluated(part)) for part, each in enumerate(found))


def test_each_evaluates_a_share_in_a_thread_of_its_own_and_the_order_stays():
    threads: dict[int, set[int]] = {}

    def noted(part: int) -> Tensor:
        threads.setdefault(part, set()).add(threading.get_ident())
        return evaluated(part)

    with closing(helpers(noted, noted)) as found:
        assert right(run(found, noted)) and found.devices == 3
        assert sorted(len(each) for each in threads.values()) == [1] * 6 + [2] * 2  # the first of each is looked at
        assert len(set.union(*threads.values())) == 3
        threads.clear()
        assert right(run(found, noted)) and all(len(each) == 1 for each in threads.values())
    assert not [each for each in threading.enumerate() if each.name.startswith("accdiff-helper")]


def test_the_faster_one_does_more_and_the_gain_is_what_they_were_busy():
    counts = [0, 0]

    def slow(part: int) -> Tensor:
        counts[1] += 1
        time.sleep(0.03)
        return evaluated(part)

    def own(part: int) -> Tensor:
        counts[0] += 1
        time.sleep(0.003)
        return evaluated(part)

    with closing(helpers(slow)) as found:
        run(found, own)
        found.gain(1.0)
        counts[:] = [0, 0]
        begin = time.perf_counter()
        for _ in range(4):
            assert right(run(found, own))
        seconds = time.perf_counter() - begin
        assert counts[0] > 4 * counts[1]
        assert 0.5 < found.gain(seconds) <= 2


@pytest.mark.parametrize(("helper", "why"), [
    (CannotHelp("it is green"), "it is green"),
    (OutOfMemory("it takes 5.0 GB, of which 1.0 GB are free"), "it takes 5.0 GB, of which 1.0 GB are free"),
    (RuntimeError("Expected all tensors\nto be on the same device"), "RuntimeError: Expected all tensors"),
    (lambda part: evaluated(part) + 1, "another extension"),
    (lambda part: evaluated(part)[:1], "another extension"),
    (lambda part: evaluated(part) * float("nan"), "another extension"),
    (lambda part: evaluated(part) if part < 5 else 1 / 0, "ZeroDivisionError"),
], ids=lambda value: "" if callable(value) else str(value)[:20])
def test_one_that_fails_is_left_out_in_one_line(helper, why):
    def of_one(part: int) -> Tensor:
        assert threading.current_thread() is threading.main_thread()
        return evaluated(part)

    progress = Progress()
    with closing(helpers(helper)) as found:
        assert right(run(found, of_one, progress=progress))
        assert found.devices == 1 and found.at_once(4) == 4
        assert right(run(found, of_one, progress=progress))
    text, = progress.comments
    assert text.startswith("GPU 1 does not help (") and why in text and "\n" not in text
    assert text.endswith("; the picture is made on one device")


def test_the_others_go_on_without_it():
    progress = Progress()
    with closing(helpers(CannotHelp("no"), evaluated)) as found:
        assert right(run(found, progress=progress)) and found.devices == 2
    assert progress.comments == ["GPU 1 does not help (no); the picture is made on 2 devices"]


def test_memory_that_runs_out_there_is_no_matter_here(monkeypatch):
    def short(part: int) -> Tensor:
        if part >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluated(part)

    released = []
    monkeypatch.setattr(memory, "release", lambda: released.append(1))
    progress = Progress()
    with closing(helpers(short)) as found:
        assert right(run(found, progress=progress)) and released
    assert "its memory does not suffice" in progress.comments[0]


def test_rounding_is_no_difference_and_nan_of_the_network_says_nothing():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert alike(values, values.clone()) and alike(values, values * 1.001)
    assert not alike(values, values * 1.05) and alike(values.bfloat16(), (values * 1.01).bfloat16())
    assert not alike(values, values.half())

    def nan(part: int) -> Tensor:
        time.sleep(0.02)  # slower than the helper, which so gets a share again
        return evaluated(part) * float("nan")

    with closing(helpers(lambda part: evaluated(part) + 1)) as found:
        run(found, nan)
        assert found.devices == 2  # until there is something to go by
        assert right(run(found)) and found.devices == 1


def test_an_error_here_is_raised_when_nobody_works_any_more():
    ended = threading.Event()

    def slow(part: int) -> Tensor:
        time.sleep(0.01)
        if part == 7:
            ended.set()
        return evaluated(part)

    def fails(part: int) -> Tensor:
        raise ValueError("here")

    with closing(helpers(slow)) as found:
        with pytest.raises(ValueError, match="here"):
            run(found, fails)
        assert ended.is_set()
        assert right(run(found))


def test_a_stop_is_heeded_between_two_parts_by_all():
    progress, counts = Progress(), [0]

    def counted(part: int) -> Tensor:
        counts[0] += 1
        progress.interrupted = counts[0] >= 3
        time.sleep(0.01)
        return evaluated(part)

    with closing(helpers(counted)) as found:
        with pytest.raises(Interrupted):
            run(found, counted, parts=100, progress=progress)
        assert counts[0] <= 4 and found.devices == 2


@pytest.mark.parametrize("modes", [
    lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.inference_mode(), nullcontext])
def test_a_helper_computes_as_the_thread_that_it_helps(modes):
    seen = []

    def noted(part: int) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), (torch.eye(2) @ torch.eye(2)).dtype))
        return evaluated(part)

    with closing(helpers(noted)) as found, torch.no_grad(), modes():
        run(found, noted)
    assert len(seen) == 9 and len(set(seen)) == 1


def test_a_batcher_gives_whole_rounds_which_are_divided_as_without_helpers():
    host: Any = SimpleNamespace(progress=Progress(), latents_that_fit=lambda height, width: 5)
    calls = []
    with closing(helpers(evaluated)) as found:
        def evaluate(part: slice) -> Tensor:
            calls.append((part, found.size))
            return torch.arange(part.start, part.stop)

        batcher = Batcher(host, 3, found)
        predicted = [(part, each) for part, each in batcher.run(40, 1, 1, evaluate)]
        assert torch.equal(torch.cat([each for _, each in predicted]), torch.arange(40))
        assert [part for part, _ in calls] == [slice(0, 30), slice(30, 39), slice(39, 40)] and found.size == 0
        assert [size for _, size in calls] == [3, 3, 1]
        assert found.at_once(1) == ROUND and found.at_once(40) == 80
        calls.clear()
        halves, = batcher.run_all(Latents(2, 1, 1, evaluate, halves=True))
        assert [part for part, _ in halves] == [slice(0, 1), slice(1, 2)] and all(size == 0 for _, size in calls)
        found.close()
        calls.clear()
        list(batcher.run(4, 1, 1, evaluate))
        assert [part for part, _ in calls] == [slice(0, 3), slice(3, 4)]  # the helper has gone


def test_too_little_memory_here_makes_the_parts_smaller():
    host: Any = SimpleNamespace(progress=Progress())
    with closing(helpers(evaluated)) as found:
        def evaluate(part: slice) -> Tensor:
            if found.size > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return torch.arange(part.start, part.stop)

        predicted = [each for _, each in Batcher(host, 8, found).run(40, 1, 1, evaluate)]
        assert torch.equal(torch.cat(predicted), torch.arange(40))
