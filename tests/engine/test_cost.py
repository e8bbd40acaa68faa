"""What a run costs, in plain numbers; that runs take what is said, test_extrapolate and the methods' tests see."""

from __future__ import annotations

import pytest

from accdiff_lib.engine.cost import Part, estimate
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.methods import make, of
from accdiff_lib.standalone.samplers import solver
from tests.engine.test_schedule import LEVELS


def parts(values=None, *, base=(256, 256), **changes) -> list[Part]:
    settings = make({"tolerance": 0, **(values or {})})
    made = solver("Heun", "Karras", 3, LEVELS)
    given = {"base_solver": made, "stage_solver": made, "timestep": LEVELS.timestep, "guidance": 5.0,
             "has_control": False, **changes}
    return estimate(of(settings), make_plan(base, settings, native=32), settings, **given)


def counted(part: Part) -> list[tuple[str, int, int, int]]:
    return [(work.name, work.count, work.height, work.width) for work in part.work]


def test_the_base_pass_is_its_calls():
    base, stage = parts({"target_width": 512, "target_height": 256})
    assert (base.name, base.pixels, base.steps, base.calls) == ("base", (128, 256), 3, 5)  # Heun's last step is one
    assert counted(base) == [("picture", 5, 32, 32)] and (base.latents, base.unet, base.controlnet) == (5, 10, 0)
    assert (stage.name, stage.pixels, stage.steps, stage.calls) == ("2x", (256, 512), 3, 5)


@pytest.mark.parametrize(("values", "changes", "count"), [
    ({}, {}, 1), ({"window_prompts": False}, {}, 0), ({"scale": 1}, {}, 0), ({}, {"base": (512, 512)}, 1)])
def test_a_given_pictures_words_are_looked_for_once(values, changes, count):
    base = parts(values, from_image=True, **changes)[0]
    assert counted(base) == [("picture", count, 32, 32)] and base.steps == base.calls == count


@pytest.mark.parametrize(("values", "from_image", "more"), [
    ({}, False, 1), ({"window_prompts": False}, False, 0), ({"scale": 1}, False, 0), ({}, True, 0)])
def test_edited_prompts_are_looked_for_afterwards(values, from_image, more):
    base, same = (parts(values, seen_in_base=seen, from_image=from_image)[0] for seen in (False, True))
    assert base.latents == same.latents + more and base.calls == same.calls


def test_without_a_base_picture_there_is_no_hint_but_of_a_picture_given():
    def controlled(**changes):
        changes = {"has_control": True, **changes}
        return parts({"method": "multidiffusion", "controlnet": True}, **changes)[-1].controlnet > 0

    assert not controlled() and controlled(has_guide=True) and controlled(from_image=True)
    assert not controlled(has_guide=True, has_control=False)


@pytest.mark.parametrize(("weights", "guidance", "factor"), [
    ([1.0], 5.0, 2), ([0.5, 0.5], 5.0, 3), ([1.0, 1.0, 1.0], 5.0, 4), ([1.0], 1.0, 1), ([0.5, 0.5], 1.0, 2),
    ([1.0, 1.0], 1.0, 3)])
def test_a_prompt_of_parts(weights, guidance, factor):
    """One evaluation for each; without CFG the negative prompt's too, unless the weights are one together."""
    for part in parts(weights=weights, guidance=guidance):
        assert part.unet == factor * part.latents
        assert sum(work.unet for work in part.at_most) == factor * sum(work.count for work in part.at_most)


def test_the_price_of_a_part():
    part = Part(None, (64, 64), 1, 1, (), (Work("a", 2, 8, 8, guided=True, control=True),
                                           Work("b", 3, 8, 8, guided=False)))
    assert part.priced(lambda work: (10.0, 1.0) if work.name == "a" else (100.0, 7.0)) == 4 * 11 + 3 * 100


def test_at_most_and_together():
    """Steps without windows come first: of each kind the largest counts at most, and all together."""
    stage = parts({"tolerance": 1e-3, "control_end": 0.4}, has_control=True)[-1]
    at_most = {work.name: work.count for work in stage.at_most}
    assert list(at_most.items()) == [("window", 9), ("dilated view", 4)]  # in the method's own order
    together = {(work.name, work.control): work.count for work in stage.work}
    assert sum(together.values()) == stage.latents and len(together) == len(stage.work)
    assert all(count % at_most[name] == 0 for (name, _), count in together.items())
