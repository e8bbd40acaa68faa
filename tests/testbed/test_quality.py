"""The quality benchmark: what it compares, what it measures, how it sums up, and that it goes on where it stopped."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from accdiff_lib.engine.plan import CELL, make_plan
from accdiff_lib.methods import make
from accdiff_lib.methods.fused import grid_of
from accdiff_lib.parts.prompts import lay_out, split_words
from accdiff_lib.parts.window_prompts import window_prompts
from accdiff_lib.parts.windows import Window
from accdiff_lib.settings import PRESETS
from accdiff_lib.standalone.loading import EMBEDDED, load_tokenizer
from testbed.captions import plain_caption
from testbed.counting import find, wanted
from testbed.lettering import Lettering
from testbed.quality import report
from testbed.quality.__main__ import main, publish
from testbed.quality.contenders import CONTENDERS, SUBJECT, EmptyPrompts, TruePrompts, regions_of, settings_of
from testbed.quality.forms import LONG, SHORT, Block, tasks
from testbed.quality.metrics import GHOST, METRICS, detail, ghosts, measure, psnr, seams, without_parts
from testbed.quality.sheets import arrange
from testbed.quality.sources import module_files
from testbed.quality.statistics import difference, estimate, paired_p
from testbed.quality.tasks import BOTH, Setup, scene
from testbed.scenes import PALETTE, VISIBLE, Scene, Thing, View, draw, held_out, render, visible

BALL_AND_STAR = Scene((Thing("red", "ball", 0.3, 0.6, 0.15), Thing("blue", "star", 0.72, 0.55, 0.18)), "grass", "day",
                      0.45)
NAN = math.nan


# What is compared


def test_reported_scenes_are_held_out_and_reproducible():
    reported = [scene(number) for number in range(20)]
    assert all(held_out(each) for each in reported) and len(set(reported)) == 20
    assert reported == [scene(number) for number in range(20)]
    assert not {scene(number, 6500) for number in range(20)} & set(reported)


def changed(name: str, scale: int = 4, **changes) -> set[str]:
    """The settings in which a contender differs from plain AccDiffusion v2."""
    ours, plain = (asdict(settings_of(CONTENDERS[each], scale, 5, 32, given))
                   for each, given in ((name, changes), (SUBJECT, {})))
    return {key for key in ours if ours[key] != plain[key]}


def test_an_ablation_switches_one_part_off():
    for contender in CONTENDERS.values():
        if contender.kind == "ablation":
            part = contender.name.removeprefix("v2 without ").replace(" ", "_")
            assert changed(contender.name) == {part}
            assert getattr(settings_of(contender, 4, 5, 32, {}), part) is False
    assert changed("accdiffusion-v1") == {"method", "controlnet"}
    assert changed("v2, true prompts") == {"c"} and changed("v2, empty prompts") == set()
    assert changed("v2, paper's membership") == {"membership"}


def test_changes_are_for_accdiffusion_v2_and_its_variations():
    assert changed("v2 without jitter", c=0.1) == {"jitter", "c"}
    assert settings_of(CONTENDERS["demofusion"], 2, 5, 32, {"c": 0.1}).c == 0.3
    assert settings_of(CONTENDERS["v2, true prompts"], 2, 5, 32, {"c": 0.1}).c == VISIBLE
    with pytest.raises(Exception, match="interaction"):
        settings_of(CONTENDERS[SUBJECT], 2, 5, 32, {"interaction": "perhaps"})


def test_a_preset_is_compared_as_users_get_it():
    named = {name for name, contender in CONTENDERS.items() if "preset" in contender.settings}
    assert named == {"best", "balanced", "fast"} <= set(PRESETS)
    for name in named:
        settings = settings_of(CONTENDERS[name], 4, 5, 32, {})
        assert settings == make({"preset": name, "scale": 4}) and settings.stage_steps == PRESETS[name]["stage_steps"]
        assert settings_of(CONTENDERS[name], 4, 5, 32, {"start": 0.7}).start == 0.7


@pytest.mark.parametrize("scale", [2, 4])
def test_direct_inference_is_one_window(scale):
    settings = settings_of(CONTENDERS["direct"], scale, 5, 32, {})
    grids = [grid_of(stage, settings) for stage in make_plan((256, 256), settings, native=32).stages]
    assert [grid.window_count for grid in grids] == [1] and grids[0].window == (32 * scale, 32 * scale)


def test_tasks_of_the_forms():
    every = tasks(LONG.blocks)
    assert len(set(every)) == len(every)
    for name, contender in CONTENDERS.items():
        mine = [task for task in every if task.contender == name]
        assert {task.track for task in mine} == (set(contender.tracks) if contender.has_base else {BOTH})
        assert {task.scale for task in mine} == set(contender.scales)
        assert len(mine) == 40 * len(contender.scales) * len({task.track for task in mine})
    assert {task.contender for task in every if task.track == BOTH} == {
        "direct", "multidiffusion", "scalecrafter", "elasticdiffusion"}
    assert {task.contender for task in tasks(SHORT.blocks) if task.scale == 4} == {
        name for name, contender in CONTENDERS.items() if contender.kind == "main"}
    only = tasks(SHORT.blocks, ["v2 without progressive"])
    assert only and {(task.scale, task.contender) for task in only} == {(4, "v2 without progressive")}


def test_a_key_changes_with_all_that_matters():
    setup = Setup(None, None, "cpu", "float32", 32, 30, "Euler", "Leading", 5.0, 7000)
    one = tasks(SHORT.blocks, [SUBJECT])[0]
    others = [replace(setup, steps=31).key(one), replace(setup, cfg=6.0).key(one), setup.key(replace(one, scene=1)),
              replace(setup, changes={"c": 0.1}).key(one), replace(setup, seed_base=1).key(one),
              replace(setup, controlnet=EMBEDDED / "vae").key(one), setup.key(replace(one, stage_steps=99))]
    assert len({setup.key(one), *others}) == len(others) + 1
    assert setup.key(one) == replace(setup, out=Path("elsewhere")).key(one)
    plain = tasks(SHORT.blocks, ["demofusion"])[0]
    assert setup.key(plain) == replace(setup, changes={"c": 0.1}).key(plain)


def test_the_digest_is_of_the_modules_that_are_used():
    files = {path.relative_to(EMBEDDED.parent.parent).as_posix() for path in module_files("testbed.quality.pictures")}
    assert {"testbed/quality/metrics.py", "testbed/counting.py", "accdiff_lib/engine/canvas.py",
            "accdiff_lib/parts/vae_layers.py", "accdiff_lib/parts/checkpoint.py",
            "accdiff_lib/standalone/samplers.py", "accdiff_lib/__init__.py"} <= files
    assert not {"accdiff_lib/command/run.py", "accdiff_lib/command/report.py", "testbed/diffusion.py",
                "testbed/quality/forms.py", "testbed/quality/report.py"} & files


# The controls


def host() -> SimpleNamespace:
    """What `locate` needs of a host: the tokenizer's words."""
    tokenizer = load_tokenizer(EMBEDDED / "tokenizer")
    return SimpleNamespace(words=lambda prompt: lay_out(prompt, lambda text: split_words(tokenizer, text))[1])


def prompts_of(kind, world: Scene, scale: int) -> list[tuple[View, str]]:
    """The windows of a picture as views of the scene, with their prompts."""
    settings = settings_of(CONTENDERS[kind], scale, 5, 32, {"jitter": False})
    plan = make_plan((256, 256), settings, native=32)
    request = SimpleNamespace(prompt=plain_caption(world))
    words = CONTENDERS[kind].engine(host(), world).locate(request, torch.zeros(16, 16, 77))
    stage = plan.stages[-1]
    found = window_prompts(words, grid_of(stage, settings).windows(None), settings.c,
                           size=(stage.height, stage.width), membership=settings.membership)
    side = 32 * scale
    return [(View(w.top / side, w.left / side, (w.top + w.height) / side, (w.left + w.width) / side), prompt)
            for w, prompt in zip(found.windows, found.prompts, strict=True)]


def test_every_word_has_its_region():
    prompt = plain_caption(BALL_AND_STAR)
    words = host().words(prompt)
    assert [word.text for word in words] == ["a", "red", "ball", "and", "a", "blue", "star", "on", "grass", ",",
                                             "day", "sky"]
    assert regions_of(words, prompt, BALL_AND_STAR) == [0, 0, 0, 1, 1, 1, 1, "ground", "ground", "sky", "sky", "sky"]


@pytest.mark.parametrize("scale", [2, 4])
def test_true_prompts_name_what_a_window_shows(scale):
    assert isinstance(CONTENDERS["v2, true prompts"].engine(host(), BALL_AND_STAR), TruePrompts)
    wrong = total = 0
    for number in range(5):
        world = scene(number)
        for view, prompt in prompts_of("v2, true prompts", world, scale):
            for index, thing in enumerate(world.things):
                assert (f"{thing.colour} {thing.shape}" in prompt) == (thing.colour in prompt.split())
                wrong += (index in visible(world, view)) != (thing.colour in prompt.split())
                total += 1
    assert wrong <= 0.03 * total


def test_empty_prompts():
    assert isinstance(CONTENDERS["v2, empty prompts"].engine(host(), BALL_AND_STAR), EmptyPrompts)
    assert {prompt for _, prompt in prompts_of("v2, empty prompts", BALL_AND_STAR, 2)} == {""}


# Metrics


def pictures(world: Scene, scale: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The render at `scale` times 256, and the base picture."""
    return render(world, 256 * scale, 256 * scale), render(world, 256, 256)


def measured(image: np.ndarray, world: Scene = BALL_AND_STAR, *, base: bool = True, clean: bool = True) -> dict:
    truth, small = pictures(world)
    return measure(image, world, truth, 2, small if base else None, clean, grid_of_windows())


def grid_of_windows() -> tuple[Window, ...]:
    plan = make_plan((256, 256), make({"jitter": False}), native=32)
    return grid_of(plan.stages[-1], make({"jitter": False})).windows(None)


def test_the_true_render_is_perfect():
    world = replace(BALL_AND_STAR, lettering=Lettering("OPEN", 0.5, 0.9, 0.05))
    values = measured(pictures(world)[0], world)
    assert set(values) == set(METRICS)
    for name, metric in METRICS.items():
        if metric.best is not None:
            assert values[name] == pytest.approx(metric.best, abs=0.06), name
    assert values["psnr"] == values["coarse"] == pytest.approx(100)


def test_repeats_and_losses_are_counted():
    copy = Thing("red", "ball", 0.5, 0.85, 0.07)
    values = measured(render(replace(BALL_AND_STAR, things=(*BALL_AND_STAR.things, copy)), 512, 512))
    assert (values["extra"], values["missing"], values["exact"], values["ghosts"]) == (1, 0, 0, 0)
    assert 1.03 < values["area"] < 1.3 and values["iou"] < 0.97
    values = measured(render(replace(BALL_AND_STAR, things=BALL_AND_STAR.things[:1]), 512, 512))
    assert (values["extra"], values["missing"], values["exact"]) == (0, 1, 0)
    assert values["colour"] == values["shape"] == 0.5


def test_the_sampled_track_asks_for_what_the_base_picture_shows():
    other = Scene((Thing("green", "heart", 0.5, 0.6, 0.15),), "grass", "day", 0.45)
    truth, base = pictures(other)
    values = measure(truth, BALL_AND_STAR, pictures(BALL_AND_STAR)[0], 2, base, False, grid_of_windows())
    assert (values["extra"], values["missing"], values["shape"], values["exact"]) == (0, 0, 1, 0)
    assert values["iou"] > 0.95 and math.isnan(values["psnr"]) and math.isnan(values["coarse"])


def test_without_a_base_picture_things_may_be_anywhere():
    moved = replace(BALL_AND_STAR, things=tuple(replace(thing, x=1 - thing.x) for thing in BALL_AND_STAR.things))
    values = measured(render(moved, 512, 512), base=False)
    assert values["exact"] == 1 and values["shape"] == 1
    assert {name for name, value in values.items() if math.isnan(value)} == {
        "iou", "psnr", "coarse", "ghosts", "true_detail", "edges", "lettering", "patches", "tint", "grain",
        "gain"}
    assert measured(render(moved, 512, 512))["exact"] == 0


def test_a_corner_of_another_colour_is_no_extra_thing():
    image = pictures(BALL_AND_STAR)[0]
    tip = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(tip, [np.array([[120, 360], [190, 360], [155, 390]])], 1)
    image[tip > 0] = PALETTE["green"]
    found = find(image)
    assert len(found) == 3 and len(without_parts(found, wanted(BALL_AND_STAR))) == 2
    assert measured(image)["extra"] == 0
    image[20:60, 20:60] = PALETTE["orange"]
    assert measured(image)["extra"] == 1


def test_blur_costs_sharpness_and_detail_but_not_structure():
    truth, base = pictures(BALL_AND_STAR)
    enlarged = cv2.resize(base, (512, 512), interpolation=cv2.INTER_LANCZOS4)
    values = measured(enlarged)
    assert values["sharpness"] < 0.2 and values["coarse"] > values["psnr"] + 6
    assert values["exact"] == 1 and values["ghosts"] == 0 and values["seams"] == pytest.approx(1, abs=0.05)
    darker = measured((truth * 0.9).astype(np.uint8))
    assert darker["sharpness"] > 0.75 and darker["coarse"] < 30
    assert psnr(truth, truth) > psnr(truth, enlarged) > psnr(truth, 255 - truth)
    noise = np.random.default_rng(0).normal(0, 20, truth.shape)
    assert detail(np.clip(truth + noise, 0, 255).astype(np.uint8), 2) > 1.5 * detail(truth, 2)


def test_seams_are_seen_where_the_windows_end_and_only_there():
    truth = pictures(BALL_AND_STAR)[0]
    windows = grid_of_windows()
    light = np.zeros(truth.shape[:2], int)
    for number, window in enumerate(windows):
        light[window.top * CELL:(window.top + window.height) * CELL,
              window.left * CELL:(window.left + window.width) * CELL] += 8 * (number % 2)
    broken = np.clip(truth.astype(int) + light[..., None], 0, 255).astype(np.uint8)
    assert seams(broken, windows) > 1.5 * seams(truth, windows)
    moved = [Window(w.top + 3, w.left - 5, w.height, w.width) for w in windows]
    assert seams(broken, moved) < 1.1 * seams(truth, moved)
    assert math.isnan(seams(truth, [Window(0, 0, 64, 64)]))  # one window has no border within


def test_a_grid_of_views_is_seen():
    truth = pictures(BALL_AND_STAR)[0].astype(int)
    rows, columns = np.mgrid[:512, :512] // CELL % 2
    image = np.clip(truth + (12 * ((rows + columns) % 2) - 6)[..., None], 0, 255).astype(np.uint8)
    assert measured(image)["grid"] > 1.5
    coarse = np.clip(truth + (12 * ((np.mgrid[:512, :512] // 64).sum(0) % 2) - 6)[..., None], 0, 255).astype(np.uint8)
    assert measured(coarse)["grid"] < 1.1


def ghost(rng: np.random.Generator, world: Scene, shrink: int) -> Scene:
    """The scene with a smaller copy of its first thing, apart from all others."""
    model = world.things[0]
    while True:
        size = model.size / shrink
        copy = Thing(model.colour, model.shape, *rng.uniform(size, 1 - size, 2).tolist(), size)
        if all(math.hypot(copy.x - each.x, copy.y - each.y) > copy.size + each.size + 0.03 for each in world.things):
            return replace(world, things=(*world.things, copy))


def test_the_ghost_threshold():
    """Calibrated on 30 scenes: true renders reach 0.4, things of 30 % opacity at least 11 unless they are counted."""
    assert GHOST == 10
    rng = np.random.default_rng(5)
    for number in range(4):
        world = draw(rng)
        truth, base = pictures(world, 4)
        things = wanted(world)
        assert ghosts(truth, base, things) == 0
        haunted = render(ghost(rng, world, (1, 2, 4)[number % 3]), 1024, 1024)
        faint = np.rint(truth * 0.7 + haunted * 0.3).astype(np.uint8)
        counted = find(faint)
        assert len(counted) - len(things) + ghosts(faint, base, [*things, *counted]) >= 1, plain_caption(world)
        shifted = np.clip(truth.astype(int) + 6, 0, 255).astype(np.uint8)  # a whole picture that is lighter is no ghost
        assert ghosts(shifted, base, things) == 0


# Statistics


def test_estimates():
    found = estimate([1.0, 2.0, 3.0, NAN])
    assert found.mean == 2 and found.count == 3 and 1 <= found.low < 2 < found.high <= 3
    assert (estimate([0.0] * 5).low, estimate([0.0] * 5).high) == (0, 0)
    many = estimate(np.random.default_rng(0).normal(5, 2, 400).tolist())
    assert many.high - many.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert estimate([4.0]).mean == 4 and math.isnan(estimate([4.0]).low)
    assert math.isnan(estimate([NAN]).mean) and estimate([]).count == 0


def test_paired_p():
    assert paired_p([1.0] * 6, [0.0] * 6) == pytest.approx(2 / 64)
    assert paired_p([3, 1, 2, 4], [2, 0, 1, 3]) == pytest.approx(2 / 16)
    assert paired_p([1.0, 0, 1, 0], [0.0, 1, 0, 1]) == 1 == paired_p([2.0] * 9, [2.0] * 9)
    assert paired_p([*[1.0] * 6, NAN], [*[0.0] * 6, 9]) == pytest.approx(2 / 64)
    assert math.isnan(paired_p([1.0, NAN], [0.0, 1.0]))
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, 40)
    assert paired_p((noise + 1).tolist(), rng.normal(0, 0.1, 40).tolist()) < 0.001


def test_differences_are_of_pairs():
    found = difference([3.0, 5.0, NAN, 8.0], [1.0, 4.0, 9.0, NAN])
    assert (found.mean, found.count, found.low, found.high) == (1.5, 2, 1, 2)
    assert difference([], []).count == 0 and math.isnan(difference([NAN], [1.0]).mean)


# The report


def made_up(setup: Setup, blocks: list[Block]) -> dict:
    """Results in which only AccDiffusion v2 has no extra things."""
    results = {}
    for task in tasks(blocks):
        values = dict.fromkeys(METRICS, 1.0 + task.scene / 100)
        values["extra"] = 0.0 if task.contender == SUBJECT else 3.0
        if task.track == BOTH:
            values["iou"] = None
        values["psnr"] = None
        results[setup.key(task)] = {"key": setup.key(task), "scene": task.scene, "metrics": values, "seconds": 1.5}
    return results


def test_the_report(tmp_path):
    setup = Setup(None, None, "cpu", "float32", 32, 30, "Euler", "Leading", 5.0, 7000, {"c": 0.1}, tmp_path)
    blocks = [Block("sampled", 2, ("main",), 6, 12)]
    tables = report.tabulate(blocks, [], setup, made_up(setup, blocks))
    text = report.markdown(tables, setup, "python -m testbed.quality --set c=0.1", ["a note"],
                           {blocks[0]: tmp_path / "sampled-2x.jpg"})
    for part in ("`python -m testbed.quality --set c=0.1`", report.commit(), "30 steps, Euler", "c = 0.1", "a note",
                 "Scenes: 6. Steps of a stage: 12.", "](sampled-2x.jpg)", report.device_name("cpu")):
        assert part in text
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in text.splitlines() if line.startswith("|")}
    head = rows[""]
    assert "PSNR" not in head and "coarse PSNR" in head  # a column without numbers is left out
    assert rows[f"**{SUBJECT}**"][head.index("extra")] == "0.00"
    assert rows["demofusion"][head.index("extra")] == "3.00\\*"
    assert rows["demofusion"][head.index("area")] == "1.02 (1.01 to 1.04)"
    assert rows["direct"][head.index("IoU")] == "-"
    summary = report.as_json(tables)[0]["contenders"]
    assert summary["demofusion"]["extra"]["p"] == pytest.approx(2 / 64) and summary[SUBJECT]["extra"]["p"] is None
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_suggested_preset_is_compared_scene_by_scene(tmp_path):
    setup = Setup(None, None, "cpu", "float32", 32, 30, "Euler", "Leading", 5.0, 7000, {}, tmp_path)
    block = Block("clean", 4, ("main",), 9, 24)
    results = made_up(setup, [block])
    for task in tasks([block]):
        record = results[setup.key(task)]
        if task.contender == SUBJECT and task.scene >= 8:
            del results[setup.key(task)]
        if task.contender == "balanced":
            record["metrics"]["extra"] = -2.0 if task.scene >= 8 else 1.0  # the odd one has no partner
        if task.contender == "demofusion":
            del record["metrics"]["patches"]  # not measured yet
    tables = report.tabulate([block], ["balanced", SUBJECT, "demofusion", "lanczos"], setup, results)
    text = report.markdown(tables, setup, "", [], {})
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in text.splitlines() if line.startswith("|")}
    assert lines["*balanced* less lanczos"][0] == "9"
    assert lines[f"*balanced* less {SUBJECT}"][:3] == ["8", "+0.00, p = 1", "+1.00, p = 0.0078"]
    assert lines["*balanced* less demofusion"][4] == "-" and "Scenes: 8 to 9." in text
    assert lines[f"**{SUBJECT}**"][0] == "8" and lines["balanced"][0] == "9"
    found = report.as_json(tables)[0]["differences"]["balanced"][SUBJECT]["extra"]
    assert found["count"] == 8 and found["mean"] == 1 and found["p"] == pytest.approx(2 / 256, abs=1e-6)


def test_results_of_other_code_can_be_summed_up(tmp_path, capsys):
    record = {"key": "of older code", "track": "clean", "scale": 2, "contender": "lanczos", "scene": 1,
              "metrics": dict.fromkeys(METRICS, 0.5), "seconds": 1.0}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["--summarise", "--scenes", "2", "--only", "lanczos", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| lanczos | 0.50 |" in text and "![" not in text and not list(tmp_path.glob("*.jpg"))
    assert main(["--summarise", "--only", "vae", "--out", str(tmp_path)]) == 2
    assert "has no results of these pictures" in capsys.readouterr().err


def test_a_contact_sheet_shows_all_tiles():
    tiles = [(f"number {number}", Image.new("RGB", (224, 224), (40 * number, 0, 0))) for number in range(5)]
    sheet = np.asarray(arrange([tiles, [("", image) for _, image in tiles[:3]]]))
    assert {40 * number for number in range(5)} <= set(np.unique(sheet[100, :, 0]))
    assert (sheet[2:16] < 100).any() and sheet.shape[0] < 2 * 250


# The command


@pytest.mark.parametrize(("arguments", "message"), [
    (["--only", "magic"], "'magic' is not allowed; it takes 'lanczos', 'direct'"),
    (["--set", "c"], "'c' is not allowed; it takes option=value"),
    (["--set", "scale=3"], "'scale=3' is not allowed"),
    (["--set", "c=7"], "c: '7' is not allowed"),
    (["--model", "/nowhere"], "/nowhere"),
    (["--sampler", "magic"], "magic")])
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def run(folder: Path, *arguments: str) -> dict[str, dict]:
    """Runs a tiny benchmark; the results by key, without times."""
    assert main(["--scales", "2", "--scenes", "1", "--steps", "2", "--stage-steps", "1", "--device", "cpu", "--out",
                 str(folder), *arguments]) == 0
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines() if line.endswith("}")]
    return {line["key"]: {**line, "seconds": 0} for line in lines}


def test_a_run_goes_on_where_it_stopped_with_any_number_of_jobs(tmp_path, capsys):
    first = tmp_path / "first"
    results = run(first, "--only", "lanczos", SUBJECT, "multidiffusion", "--jobs", "1", "--publish",
                  str(tmp_path / "docs"))
    assert {(line["track"], line["contender"]) for line in results.values()} == {
        ("clean", "lanczos"), ("clean", SUBJECT), ("sampled", "lanczos"), ("sampled", SUBJECT),
        (BOTH, "multidiffusion")}
    assert all(set(line["metrics"]) == set(METRICS) for line in results.values())
    bases = {path.read_bytes() for path in (first / "pictures").glob("sampled-*.base.jpg")}
    assert len(bases) == 1  # all start from the same base picture
    published = {path.name for path in (tmp_path / "docs").iterdir()}
    assert published == {"README.md", "summary.json", "results.jsonl", "clean-2x.jpg", "sampled-2x.jpg"}
    assert all(path.stat().st_size < 1_500_000 for path in (tmp_path / "docs").iterdir())
    assert "accdiffusion-v2" in capsys.readouterr().out

    # One line is cut off, one picture lost: both are made again, and nothing else.
    file = first / "results.jsonl"
    lines = file.read_text().splitlines()
    lost = next(line for line in lines if "multidiffusion" in line)
    kept = [line for line in lines if line != lost]
    file.write_text("\n".join([*kept, lost[:40]]))
    gone = next((first / "pictures").glob("clean-2x-lanczos-*.result.jpg"))
    gone.unlink()
    again = run(first, "--only", "lanczos", SUBJECT, "multidiffusion", "--jobs", "2")
    assert again == results and gone.exists()
    added = file.read_text().splitlines()[len(kept) + 1:]
    assert {json.loads(line)["contender"] for line in added} == {"multidiffusion", "lanczos"}


def test_large_results_are_not_published(tmp_path):
    publish([], {"a": {"key": "x" * 1_000_001}}, tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
