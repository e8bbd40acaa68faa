"""What a method says and is asked, in plain numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from accdiff_lib.engine.method import Call, Columns, Method, Outlook, Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.methods import make

STAGE = Stage(1, 2, 64, 64, 32, (32, 32))


@pytest.mark.parametrize(("changes", "unet", "controlnet"), [
    ({}, 20, 0), ({"guided": False}, 10, 0), ({"control": True}, 20, 20), ({"control": True, "guided": False}, 10, 10),
    ({"more": 2}, 40, 0), ({"more": 2, "prompted": 0.5}, 30, 0), ({"more": 2, "prompted": 0.0, "guided": False}, 10, 0),
    ({"more": 1, "prompted": 0.26, "control": True}, 23, 23)])
def test_evaluations_of_a_work(changes, unet, controlnet):
    work = replace(Work("window", 10, 8, 8, guided=True), **changes)
    assert (work.unet, work.controlnet) == (unet, controlnet)


def test_a_calls_own_scale_and_the_base_passs():
    call = Call(0, 0, 1.0)
    assert (call.scale(3.0, 7.0), call.scale(0.0, 7.0)) == (3.0, 7.0)
    assert replace(call, guided=False).scale(3.0, 7.0) == 1.0
    assert call.first and not replace(call, trial=1).first


def test_calls_as_columns_and_back():
    calls = [Call(step, step % 2, 1.0 + step, 0.5, 0.25 * step, step > 1, step < 2, 900.0 - step) for step in range(3)]
    columns = Columns.of(calls)
    assert columns.sigma.tolist() == [1.0, 2.0, 3.0] and columns.control.tolist() == [False, False, True]
    assert columns.calls() == calls


def test_steps_lie_in_a_part_by_both_their_edges():
    outlook = Outlook(STAGE, make(), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [], 0.0, 7.5)
    steps = np.arange(5)
    assert outlook.within(steps, 0.2, 0.6).tolist() == [False, True, True, False, False]
    assert outlook.within(steps, 0.3, 0.7).tolist() == [False, False, True, False, False]
    assert outlook.within(steps, 0, 1).all()


def test_the_first_stage_may_be_another_methods():
    """Of each stage its own method is asked, with its own settings, and a method may have nothing to say."""
    def named(name):
        return lambda stage, settings, found: [f"{name} {stage.number} {settings.start:g} {len(found)}"]

    first = Method("first", object, {}, None, None, remarks=named("first"))
    alone = Method("rest", object, {}, None, None, remarks=named("rest"))
    method = replace(alone, first=first)
    settings = replace(make({"start": 0.1}), first=make({"start": 0.4}))
    stages = [replace(STAGE, number=number) for number in (1, 2, 3)]
    assert method.said(stages, settings, lambda: [1, 2]) == ["first 1 0.4 2", "rest 2 0.1 2", "rest 3 0.1 2"]
    assert alone.said(stages[:1], settings, list) == ["rest 1 0.1 0"]
    assert method.said(stages[:1], replace(settings, first=None), list) == ["rest 1 0.1 0"]
    assert replace(method, remarks=None).said(stages, settings, list) == ["first 1 0.4 0"]
