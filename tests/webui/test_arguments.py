"""Arguments of the panel and the API, and generation parameters: every form leads to the same enlargement."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from accdiff_lib import __version__
from accdiff_lib.errors import InputError
from accdiff_lib.methods import METHODS, OPTIONS, make, names
from accdiff_lib.parts import infotext
from accdiff_lib.settings import PRESETS, SAME, Settings
from accdiff_lib.settings import values as values_in
from accdiff_lib.webui import arguments
from accdiff_lib.webui.arguments import (
    EXTRA,
    NONE,
    POSITIONAL,
    Enlargement,
    exact,
    parse,
    picked,
    restored,
    stamped,
)
from accdiff_lib.webui.arguments import infotext as parameters_of
from tests.webui_stand_in import toy

#: The order of the values as it was released. Callers of the API rely on it: names may only follow after the last one.
RELEASED = (
    "enabled", "controlnet_model", "method", "preset", "scale", "target_width", "target_height", "progressive",
    "stage_steps", "stage_sampler", "stage_scheduler", "start", "tolerance", "base_pass", "skip_residual",
    "cosine_scale_1", "windows", "window", "stride", "jitter", "window_prompts", "membership", "c", "local_guidance",
    "controlnet", "control_strength", "control_start", "control_end", "canny_sigma", "dilated", "cosine_scale_2",
    "gaussian", "gaussian_sigma", "cosine_scale_3", "interaction", "dilated_guidance", "guidance_rescale",
    "window_batch", "vae_tile", "doubling", "overlap", "window_weights", "dilated_end", "guidance_start",
    "guidance_end", "border", "first_method", "region_border", "bootstrapping", "dilation_ratio", "dilation_places",
    "dilate", "dilate_skip", "dilate_tau", "ndcfg_tau", "progressive_dilate", "inflate_tau", "low_pass", "freeu",
    "canvas_guidance", "resampling_steps", "new_p", "rrg_init_weight", "rrg_scale", "rrg_stop", "repaint", "patch_size",
    "view_join", "reduction", "elastic_guidance", "structure_guidance", "reference", "enlarger", "by_stage",
    "stage_factor", "forecast", "windows_by")


def values_of(option):
    """Any allowed value, as a slider may send it: with all its digits."""
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
    return st.floats(option.minimum, option.maximum)


#: Options of a method and of the first stage's.
some_values = st.tuples(st.sampled_from(list(METHODS)), st.sampled_from([SAME, *METHODS])).flatmap(
    lambda chosen: st.lists(st.sampled_from(names(*chosen)), unique=True).flatmap(
        lambda names: st.fixed_dictionaries({
            **{name: values_of(OPTIONS[name]) for name in names}, **dict(zip(("method", "first_method"), map(
                st.just, chosen), strict=True))})))
models = st.sampled_from([NONE, "canny.safetensors", "xl/canny, new: 2.safetensors"])


def positional(settings: Settings, model: str = NONE) -> list:
    named = {"enabled": True, "controlnet_model": model, **values_in(settings)}
    return [named.get(name) for name in POSITIONAL]


def asked_for(values, model):
    try:
        return parse([{**values, "controlnet_model": model}])
    except InputError:
        assume(False)


def test_the_order_of_values_is_append_only():
    assert POSITIONAL[:len(RELEASED)] == RELEASED == arguments._FIRST  # both lists grow before a release
    assert set(POSITIONAL) == {*OPTIONS, *EXTRA}
    assert len(set(POSITIONAL)) == len(POSITIONAL)


@given(some_values, models)
def test_both_forms_are_the_same(values, model):
    asked = asked_for(values, model)
    assert asked is not None
    assert parse(positional(asked.settings, model)) == asked
    # The WebUI fills up what follows a dict with the panel's values: they don't count.
    assert parse([{**values, "controlnet_model": model}, "other.safetensors", *positional(make())[2:]]) == asked


@given(some_values, models)
def test_round_trip_through_the_parameters(values, model):
    asked = asked_for(values, model)
    text = infotext.write("a cat", "", {"Steps": 1, "Seed": 2, "Size": "8x8", **parameters_of(asked)})
    found = restored(infotext.parse(text).values)
    assert found is not None and found.settings == asked.settings
    # Where no ControlNet takes part, its name is no part of the parameters.
    assert found.controlnet == (asked.controlnet if asked.settings.wants_control else NONE)
    assert parse(positional(found.settings, asked.controlnet)) == asked


def test_off():
    assert parse([]) is None
    assert parse([False, "gone.safetensors", "no such method"]) is None
    assert parse([{"enabled": False, "scale": 3}]) is None
    assert parse([{"scale": 3}]) == Enlargement(make({"scale": 3}))
    assert parse([None, None]) is None


def test_methods_and_presets_fill_in_for_a_dict_only():
    assert parse([{"preset": "fast", "start": 0.1}]) == Enlargement(make({"preset": "fast", "start": 0.1}))
    sent = positional(make())
    sent[POSITIONAL.index("preset")] = "fast"
    asked = parse(sent)
    assert asked is not None and asked.settings.preset == "fast" and asked.settings.stage_steps == 0


def test_numbers_as_gradio_sends_them():
    asked = parse([{"scale": 2, "window": 64.0, "c": 0.1 + 0.2, "jitter": "off"}])
    assert asked is not None
    settings = asked.settings
    assert (settings.scale, settings.window, settings.c, settings.jitter) == (2.0, 64, 0.3, False)
    assert isinstance(settings.window, int) and isinstance(settings.scale, float)
    assert exact(0.1 + 0.2) == 0.3


@pytest.mark.parametrize(("args", "named", "what"), [
    ([{"sclae": 2}], "sclae", "there is no such option; the options are enabled, controlnet_model, method, "),
    ([{"scale": 9}], "scale", "9 is not allowed; it takes a number from 1 to 8"),
    ([{"enabled": "perhaps"}], "enabled", "'perhaps' is not allowed; it takes on or off"),
    ([{"controlnet_model": 3}], "controlnet_model", "3 is not allowed; it takes any text"),
    ([{"method": "hires"}], "method", "'hires' is not allowed; it takes accdiffusion-v2, "),
    ([{"target_width": 1024}], "target_width, target_height", "give both"),
    ([{1: 2}], "args", "the keys are the options' names"),
    ([True, NONE, "accdiffusion-v2", "paper", 0.5], "scale", "0.5 is not allowed"),
    ([True] * 600, "args", "600 values are not allowed"),
    ([{"scale": 10 ** 400}], "scale", "1000000000"), ([{"window": -10 ** 5000}], "window", "a int is not allowed"),
    ([{"scale": [[[[[[[[[3]]]]]]]]]}], "scale", "[...]"), ([{"c": float("nan")}], "c", "nan is not allowed"),
    ([{"jitter": [True]}], "jitter", "[True] is not allowed"), ([{"jitter": 2}], "jitter", "on or off"),
    ([{"preset": {"a": []}}], "preset", "{'a': []} is not allowed"), ([{"\ud800": 1}], r"'\ud800'", "no such option"),
    ([{"stage_sampler": "\udfff"}], "stage_sampler", r"'\udfff' is not allowed"), ([{"x\ny": 1}], r"'x\ny'", "no such"),
    ([[]], "enabled", "[] is not allowed"), ([True, NONE, ["x" * 20_000_000]], "method", "xxx'] is not allowed"),
    ([{"regions": False}], "regions", "takes a list"), ([{"control_map": 0}], "control_map", "would guide nothing"),
    ([{"enabled": False, "sclae": 2}], "sclae", "there is no such option")])
def test_wrong_values(args, named, what):
    with pytest.raises(InputError) as caught:
        parse(args)
    assert str(caught.value).startswith(f"{named}: ") and what in str(caught.value)
    assert len(str(caught.value).encode()) < 3000 and "\n" not in str(caught.value)


def test_the_settings_pages_defaults(monkeypatch):
    defaults = {"controlnet_model": "canny.safetensors", "vae_tile": 64}
    assert parse([{}], defaults=defaults) == Enlargement(make({"vae_tile": 64}), "canny.safetensors")
    assert parse([{"controlnet_model": NONE, "vae_tile": 0}], defaults=defaults) == Enlargement(make())
    with_tile = {**PRESETS, "paper": {"vae_tile": 32}}
    monkeypatch.setattr(arguments, "PRESETS", with_tile)
    assert parse([{}], defaults={"vae_tile": 64}) == Enlargement(make())  # the preset decides
    assert parse(positional(make()), defaults=defaults) == Enlargement(make())


def test_overrides():
    sent = positional(make(), "canny.safetensors")
    assert parse(sent, overrides={"scale": 3, "controlnet_model": NONE}) == Enlargement(make({"scale": 3}))
    assert parse(sent, overrides={"enabled": "off"}) is None
    assert parse([False], overrides={"enabled": "on"}) is not None
    # An axis of methods or presets brings what they stand for, though the panel sends every value; other axes win.
    assert parse(sent, overrides={"method": "demofusion", "preset": "fast", "start": 0.2}) == Enlargement(
        make({"method": "demofusion", "preset": "fast", "start": 0.2}), "canny.safetensors")
    assert parse([{"preset": "fast", "stage_steps": 7}], overrides={"method": "demofusion"}) == Enlargement(
        make({"method": "demofusion", "preset": "fast", "stage_steps": 7}))
    for name in ("method", "preset"):
        with pytest.raises(InputError, match=f"^{name}: 'wrong' is not allowed"):
            parse(sent, overrides={name: "wrong"})
    with pytest.raises(InputError, match=r"^sclae: there is no such option"):
        parse(sent, overrides={"sclae": 3})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_picking_method_and_preset_in_any_order_gives_their_settings(method, preset):
    for order in (("method", "preset"), ("preset", "method")):
        now = {name: row.default for name, row in OPTIONS.items()}
        for which in order:
            now[which] = {"method": method, "preset": preset}[which]
            now.update(picked(which, now["method"], now["preset"]))
        own = {name: value for name, value in now.items() if name in names(method)}
        assert make(own) == make({"method": method, "preset": preset})
    assert set(picked("preset", method, preset)) == {name for p in PRESETS.values() for name in p}


# --- a method with options of its own --------------------------------------------------------------------------

@pytest.fixture
def with_toy():
    with toy.registered():
        yield


def test_an_option_that_the_method_does_not_have(with_toy):
    for wrong in ({"method": "toy", "window": 64}, {"toy_share": 0.2}, {"method": "demofusion", "toy_way": "fancy"}):
        with pytest.raises(InputError, match=f"^{list(wrong)[-1]}: [a-z2-]+ has no such option; it has method, "):
            parse([wrong])
    assert parse([{"method": "toy", "toy_share": 0.2}]) == Enlargement(make({"method": "toy", "toy_share": 0.2}))


def test_the_panel_and_axes_may_send_what_the_method_does_not_have(with_toy):
    sent = {"enabled": True, "controlnet_model": NONE, **{name: row.default for name, row in OPTIONS.items()}}

    def by_position(**values):
        return [{**sent, **values}[name] for name in arguments.POSITIONAL]

    assert parse(by_position(toy_share=0.2)) == Enlargement(make())
    wanted = Enlargement(make({"method": "toy", "toy_share": 0.2, "controlnet": True}))
    assert parse(by_position(method="toy", toy_share=0.2, window=64)) == wanted
    # An axis of another method's option changes nothing; one of methods leaves behind what the new one lacks.
    assert parse([{"scale": 3}], overrides={"toy_share": 0.2}) == Enlargement(make({"scale": 3}))
    assert parse([{"scale": 3, "window": 64}], overrides={"method": "toy"}) == Enlargement(
        make({"method": "toy", "scale": 3}))
    assert parse(by_position(window=64), overrides={"method": "toy", "c": 0.2}) == Enlargement(
        make({"method": "toy", "toy_share": 0.7, "controlnet": False}))


def test_picking_a_method_leaves_alone_what_it_does_not_have(with_toy):
    assert picked("method", "toy", "fast").keys() == {"controlnet", "toy_share", "skip_residual", "progressive",
                                                      "base_pass", "structure_guidance", "reference"}
    assert "toy_share" not in picked("method", "demofusion", "fast")
    # A preset sets also what the method lacks, for the one that is picked next.
    assert picked("preset", "toy", "fast").keys() == {name for preset in PRESETS.values() for name in preset}


def test_a_new_methods_options_follow_the_released_ones(with_toy):
    assert arguments.POSITIONAL[-2:] == ("toy_way", "toy_share") and arguments.POSITIONAL[:len(RELEASED)] == RELEASED


# --- generation parameters -------------------------------------------------------------------------------------

def test_a_preset_of_the_past_says_what_it_is_now():
    for args, overrides in (([{"preset": "low-vram"}], {}), ([True, NONE, "accdiffusion-v2", "low-vram"], {}),
                            ([{}], {"preset": "low-vram"})):
        asked = parse(args, overrides=overrides)
        assert asked == Enlargement(make())
        assert [note.partition(",")[0] for note in asked.settings.notes] == ["preset: low-vram is paper now"]


def test_parameters_of_an_enlargement():
    assert parameters_of(Enlargement(make())) == {"AccDiffusion": __version__}
    assert parameters_of(Enlargement(make({"scale": 4}), "canny.safetensors")) == {
        "AccDiffusion": __version__, "AccDiffusion scale": "4", "AccDiffusion ControlNet model": "canny.safetensors"}
    without = Enlargement(make({"controlnet": False}), "canny.safetensors")
    assert "AccDiffusion ControlNet model" not in parameters_of(without)
    assert restored({"Steps": "20"}) is None


def test_parameters_do_not_stay_behind_in_the_next_cell_of_a_grid():
    before = {"Style": "x", "Script": "X/Y/Z plot"}
    first = stamped(before, Enlargement(make({"scale": 4}), "canny.safetensors"))
    assert first["AccDiffusion scale"] == "4" and first["Style"] == "x"
    assert stamped(first, Enlargement(make())) == {**before, "AccDiffusion": __version__}
    assert stamped(first, None) == before
