"""The table of options: consistent with itself, and every value survives text, infotext and methods."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from accdiff_lib.engine.plan import make_plan
from accdiff_lib.errors import InputError
from accdiff_lib.methods import METHODS, OPTIONS, changed, from_infotext, infotext, make, names, of
from accdiff_lib.parts import infotext as parameters
from accdiff_lib.settings import PRESETS, SAME, values


def some_value(option):
    """Any allowed value, as precise as an infotext keeps it."""
    if option.kind is bool:
        return st.booleans()
    if option.choices:
        return st.sampled_from(option.choices)
    if option.name == "by_stage":
        return st.sampled_from(["", "start=0.5/0.4 guidance_rescale=0.2"])
    if option.kind is str:
        return st.sampled_from(["Same", "Euler a", "DPM++ 2M", "Karras"])
    if option.kind is int:
        return st.integers(int(option.minimum), int(option.maximum))
    return st.floats(option.minimum, option.maximum).map(lambda value: float(f"{value:.10g}")).filter(
        lambda value: option.minimum <= value <= option.maximum)


#: Options of a method and of the first stage's.
given_options = st.tuples(st.sampled_from(list(METHODS)), st.sampled_from([SAME, *METHODS])).flatmap(
    lambda chosen: st.lists(st.sampled_from(names(*chosen)), unique=True).flatmap(
        lambda names: st.fixed_dictionaries({
            **{name: some_value(OPTIONS[name]) for name in names}, **dict(zip(("method", "first_method"), map(
                st.just, chosen), strict=True))})))


def test_the_table_is_consistent():
    for option in OPTIONS.values():
        assert option.parse(option.default) == option.default, option.name
        assert option.help.endswith("."), option.name
        if option.kind in (int, float):
            assert option.minimum is not None and option.maximum is not None and option.step is not None, option.name
            assert option.minimum <= option.default <= option.maximum
        else:
            assert option.minimum is None and option.maximum is None
    for unique in ("label", "infotext", "shown"):
        assert len({getattr(option, unique).lower() for option in OPTIONS.values()}) == len(OPTIONS)
    for method in METHODS:
        assert sorted(values(make({"method": method}))) == sorted(names(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_and_preset_is_valid(method, preset):
    settings = make({"method": method, "preset": preset})
    for name, value in {**PRESETS[preset], **METHODS[method].values}.items():
        if name not in names(method):
            continue
        assert getattr(settings, name) == OPTIONS[name].parse(value)
    assert not set(changed(settings)) - {"method", "preset"}
    assert from_infotext(infotext(settings)) == settings


def test_automatic_may_be_called_so():
    assert make({"stage_steps": "Auto", "target_width": "auto", "target_height": 0}) == make()
    assert make({"method": "scalecrafter", "dilate_tau": "auto"}) == make({"method": "scalecrafter"})
    with pytest.raises(InputError, match=r"^start: 'auto' is not allowed; it takes a number from 0 to 0\.95"):
        make({"start": "auto"})
    with pytest.raises(InputError, match=r"^window: 'wide' is not allowed; it takes auto or a whole number from 0"):
        make({"window": "wide"})


def test_what_counts_for_nothing_is_said():
    assert make({"doubling": True}).notes == ()
    assert make({"doubling": True, "progressive": False}).notes[0].startswith("doubling: without progressive")
    former = make({"preset": "Low-VRAM"})
    assert former.notes[0].startswith("preset: low-vram is paper now") and former == make({})
    assert "low-vram" not in OPTIONS["preset"].choices and "low-vram" not in OPTIONS["preset"].allowed


def test_a_stride_leaves_the_overlap_alone():
    assert "overlap" not in changed(make({"stride": 8, "overlap": 0.1}))
    assert make({"stride": 8, "overlap": 0.1}) == make({"stride": 8})
    assert changed(make({"overlap": 0.1})) == {"overlap": 0.1}


def test_given_options_win_over_method_and_preset():
    settings = make({"method": "demofusion", "preset": "fast", "window_prompts": True, "start": 0.1})
    assert settings.window_prompts and settings.start == 0.1
    assert not settings.interaction and settings.stage_steps == 8


@given(given_options)
def test_round_trip_through_infotext(chosen):
    try:
        settings = make(chosen)
    except InputError:
        assume(False)
    text = parameters.write("a cat", "", {"Steps": 1, "Seed": 2, "Size": "8x8", **infotext(settings)})
    assert from_infotext(parameters.parse(text).values) == settings
    assert make(changed(settings)) == settings


@given(st.sampled_from(list(OPTIONS.values())), st.data())
def test_values_as_text(option, data):
    value = data.draw(some_value(option))
    assert option.parse(str(value)) == value


BAD = [("scale", 9), ("scale", 0.5), ("scale", "nan"), ("scale", "big"), ("scale", True), ("scale", None),
       ("window_batch", 1.5), ("window_batch", -1), ("method", "hires"), ("method", 3), ("dilated", "maybe"),
       ("c", float("inf")), ("target_width", 20000)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_name_option_value_and_what_is_allowed(name, value):
    with pytest.raises(InputError) as caught:
        make({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and repr(value) in message and OPTIONS[name].allowed in message


@pytest.mark.parametrize(("wrong", "named"), [
    ({"windows": False, "dilated": False}, "windows, dilated"),
    ({"control_start": 0.6, "control_end": 0.4}, "control_start"),
    ({"target_width": 512}, "target_width, target_height"),
    ({"target_width": 513, "target_height": 512}, "target_width"),
    ({"window": 7}, "window"), ({"stage_factor": 1}, "stage_factor"),
    ({"base_pass": False}, "skip_residual"),
    ({"control_end": 0.5, "by_stage": "control_start=0.2/0.6"}, "control_start"),
    ({"color": 3}, "color")])
def test_contradictions(wrong, named):
    with pytest.raises(InputError, match=f"^{named}: "):
        make(wrong)


def test_stages_may_have_values_of_their_own():
    settings = make({"by_stage": "start=0.5/0.4, c=0.2", "start": 0.1, "first_method": "scalecrafter"})
    assert [settings.at(number).start for number in (1, 2, 3)] == [0.5, 0.4, 0.4]
    assert settings.at(1).c == settings.at(9).c == 0.2 and settings.start == 0.1
    method = of(settings)
    first, second = (method.of_stage(stage, settings) for stage in make_plan((256, 256), replace(
        settings, scale=3), native=32).stages)
    assert (first[0].name, first[1].start, second[0].name, second[1].start) == (
        "scalecrafter", 0.5, "accdiffusion-v2", 0.4)
    assert make().at(3) is not None and make().at(3) == make()


@pytest.mark.parametrize("method", ["accdiffusion-v2", "scalecrafter"])
def test_without_attention_no_stage_records_any(method):
    settings = make({"method": method, "first_method": "accdiffusion-v1"})
    without = settings.without_attention()
    assert settings.first.records_attention and settings.wants_attention
    assert without.first == replace(settings.first, window_prompts=False) and not without.wants_attention
    assert without == replace(settings, first=without.first, **(
        {"window_prompts": False} if method == "accdiffusion-v2" else {}))
    assert make().without_attention().first is None


@pytest.mark.parametrize("wrong", [
    "start", "start=", "=0.5", "start=0.5//0.4", "start=2", "colour=1", "scale=2/3", "window=32", "tolerance=0.01",
    "skip_residual=on", "start=0.5 = 0.4", "patch_size=3"])
def test_what_stages_cannot_have(wrong):
    with pytest.raises(InputError, match=r"^by_stage: "):
        make({"by_stage": wrong})
