"""The drawn world of the embedded model: pictures, captions, masks, and the finder that counts things again."""

import math

import cv2
import numpy as np
import pytest

from testbed.captions import caption, plain_caption, word_targets
from testbed.counting import Found, find, iou, match, shape_of, wanted
from testbed.scenes import (
    COLOURS,
    FULL,
    GROUNDS,
    PALETTE,
    SHAPES,
    SKIES,
    VISIBLE,
    Scene,
    Thing,
    View,
    draw,
    held_out,
    masks,
    render,
    shares,
    thing_masks,
    visible,
    zoomed,
)

WORDS = {*COLOURS, *SHAPES, *GROUNDS, *SKIES, "a", "an", "one", "the", "and", "next", "to", "beside", "with", "on",
         "in", "under", "by", "at", "of", "sky", "surface", "close-up", "drawing", "picture"}
TWO_BALLS = Scene((Thing("red", "ball", 0.25, 0.6, 0.15), Thing("orange", "ball", 0.75, 0.6, 0.15)), "snow", "night",
                  0.5)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw(rng) for _ in range(count)]


def views(count: int, seed: int = 1) -> list[View]:
    rng = np.random.default_rng(seed)
    return [zoomed(rng) for _ in range(count)]


def exact(image: np.ndarray, scene: Scene) -> bool:
    """Whether the finder finds the scene's things and no others, with their colours and shapes."""
    result = match(find(image), scene)
    return result.exact and result.shapes == result.colours == result.wanted


# Scenes and pictures


def test_everything_is_deterministic():
    assert scenes(5, 3) == scenes(5, 3) != scenes(5, 4)
    scene, view = scenes(1)[0], views(1)[0]
    first = render(scene, 96, 128, view)
    np.random.seed(1)
    assert np.array_equal(first, render(scene, 96, 128, view))
    captions = [caption(scene, view, np.random.default_rng(7)) for _ in range(2)]
    assert captions[0] == captions[1]


def test_things_are_whole_apart_and_of_different_colours():
    drawn = scenes(300)
    assert 0.4 < np.mean([len(scene.things) == 1 for scene in drawn]) < 0.6
    for scene in drawn:
        assert all(thing.size < thing.x < 1 - thing.size and thing.size < thing.y < 1 - thing.size
                   for thing in scene.things)
        if len(scene.things) == 2:
            first, second = scene.things
            assert first.colour != second.colour
            assert math.hypot(first.x - second.x, first.y - second.y) > first.size + second.size
    for names in (COLOURS, SHAPES):
        assert {getattr(thing, "colour" if names is COLOURS else "shape")
                for scene in drawn for thing in scene.things} == set(names)


def test_one_scene_in_ten_is_held_out_wherever_its_things_are():
    assert 0.05 < np.mean([held_out(scene) for scene in scenes(1000)]) < 0.15
    swapped = Scene(TWO_BALLS.things[::-1], "snow", "night", 0.3, 9)
    assert held_out(swapped) == held_out(TWO_BALLS)


def test_views_are_squares_within_the_world():
    for view in views(200):
        assert 0 <= view.top < view.bottom <= 1 and 0 <= view.left < view.right <= 1
        assert view.width == pytest.approx(view.height) and 0.25 <= view.width <= 1


@pytest.mark.parametrize("scene", scenes(4), ids=plain_caption)
def test_the_render_of_a_view_is_the_crop_of_a_larger_render(scene):
    large = render(scene, 1024, 1024)
    exactly = render(scene, 256, 256, View(0.5, 0.25, 0.75, 0.5))
    difference = np.abs(exactly.astype(float) - large[512:768, 256:512])
    assert difference.mean() < 0.5
    view = View(0.3125, 0.125, 0.8125, 0.625)
    crop = cv2.resize(large[320:832, 128:640], (256, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(render(scene, 256, 256, view).astype(float) - crop).mean() < 1.5
    small = cv2.resize(large, (256, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(render(scene, 256, 256).astype(float) - small).mean() < 1.5


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_larger_render_shows_detail_that_a_smaller_one_lacks(ground):
    scene, view = Scene((), ground, "day", 0.2), View(0.5, 0.5, 0.75, 0.75)
    fine = render(scene, 256, 256, view).astype(float)
    coarse = cv2.resize(render(scene, 64, 64, view), (256, 256), interpolation=cv2.INTER_CUBIC).astype(float)
    assert np.abs(fine - coarse).mean() > 1.5


def test_any_size_and_view():
    picture = render(TWO_BALLS, 64, 192, View(0.25, 0.0, 0.75, 1.0))
    assert picture.shape == (64, 192, 3) and picture.dtype == np.uint8
    for view in (View(0.0, 0.0, 0.05, 0.05), View(0.9, 0.9, 1.0, 1.0), View(0.58, 0.24, 0.6, 0.26)):
        assert render(TWO_BALLS, 40, 40, view).shape == (40, 40, 3)


# Masks


def test_masks_make_one_and_lie_on_the_things():
    for scene, view in zip(scenes(20), views(20), strict=True):
        every = masks(scene, view, 32, 32)
        assert np.allclose(sum(every.values()), 1, atol=1e-5)
        assert all(mask.min() >= -1e-5 and mask.shape == (32, 32) for mask in every.values())
        picture = render(scene, 256, 256, view)
        for thing, mask in zip(scene.things, thing_masks(scene, view, 256, 256), strict=True):
            inside = picture[mask == 1].astype(float)
            if len(inside) > 50:
                colour = np.median(inside, axis=0)
                assert np.abs(colour - PALETTE[thing.colour]).max() < 90 and np.ptp(colour) > 90


def test_the_masks_of_a_view_are_the_crop_of_finer_masks():
    scene = Scene((Thing("red", "star", 0.7, 0.5, 0.2, 0.2),), "snow", "night", 0.5)
    crop = thing_masks(scene, View(0.25, 0.5, 0.75, 1.0), 32, 32)
    assert crop.max() == 1
    difference = np.abs(crop - thing_masks(scene, FULL, 64, 64)[:, 16:48, 32:64])
    assert difference.mean() < 0.005 and difference.max() < 0.2


def test_shares_of_the_world():
    share = shares(TWO_BALLS, FULL)
    assert share[0] == share[1] == pytest.approx(math.pi * (0.88 * 0.15) ** 2, rel=0.02)
    assert sum(share.values()) == pytest.approx(1) and 0.39 < share["ground"] < 0.41


# Captions


def test_captions_name_exactly_the_visible_things_in_known_words():
    rng = np.random.default_rng(2)
    for scene, zoom in zip(scenes(300, 5), views(300, 6), strict=True):
        for view in (FULL, zoom):
            text = caption(scene, view, rng)
            words = [word.strip(",") for word in text.split()]
            assert set(words) <= WORDS, text
            assert "a orange" not in text and text == text.lower() and ",," not in text
            named = {word for word in words if word in COLOURS}
            expected = {scene.things[index].colour for index in visible(scene, view)}
            filled = max(shares(scene, view)[index] for index in range(len(scene.things))) >= 0.85
            assert (named <= expected and len(named) == 1) if filled else named == expected, text
            assert not set(words) & ({*GROUNDS, *SKIES} - {scene.ground, scene.sky})
            places = shares(scene, view)
            assert scene.ground not in words or places["ground"] > 0.05, text
            assert scene.sky not in words or places["sky"] > 0.05, text
            if view is FULL:
                assert all(f"{thing.colour} {thing.shape}" in text for thing in scene.things)
    assert len({caption(TWO_BALLS, FULL, rng) for _ in range(300)}) > 100


def test_plain_caption():
    assert plain_caption(TWO_BALLS) == "a red ball and an orange ball on snow, night sky"


def test_what_counts_as_visible():
    ball = TWO_BALLS.things[0]
    half = View(0.4, ball.x, 0.9, ball.x + 0.5)  # cuts the ball in the middle
    assert visible(TWO_BALLS, half)[0] == 0 and VISIBLE < 0.5
    sliver = View(0.4, ball.x + 0.1, 0.9, ball.x + 0.6)
    assert 0 not in visible(TWO_BALLS, sliver)
    inside = View(0.55, 0.2, 0.65, 0.3)
    assert visible(TWO_BALLS, inside) == [0]  # a tenth of the world's width: nothing but red
    texts = {caption(TWO_BALLS, inside, np.random.default_rng(seed)) for seed in range(40)}
    assert {"a red surface, close-up", "close-up of a red ball"} <= texts and not any("snow" in text for text in texts)


@pytest.mark.parametrize(("view", "word", "other"), [(View(0.8, 0, 1, 0.2), "snow", "sky"),
                                                    (View(0, 0, 0.3, 0.3), "night", "snow")])
def test_a_view_without_things_names_where_it_is(view, word, other):
    for seed in range(20):
        text = caption(TWO_BALLS, view, np.random.default_rng(seed))
        assert word in text and other not in text and not set(text.split()) & {"red", "orange", "ball"}


def test_word_targets_with_two_things_of_one_shape():
    text = "an orange ball next to a red ball on the snow, night sky"
    assert word_targets(text, TWO_BALLS) == [(1, 1), (2, 1), (6, 0), (7, 0), (10, "ground"), (11, "sky"), (12, "sky")]


def test_word_targets_leave_out_what_is_unclear_or_unseen():
    assert word_targets("a ball in the sky", TWO_BALLS) == [(4, "sky")]
    assert word_targets("Red ball, blue ball; grass", TWO_BALLS) == [(0, 0), (1, 0)]
    assert word_targets("a red surface, close-up", TWO_BALLS, View(0.55, 0.2, 0.65, 0.3)) == [(1, 0), (2, 0)]
    assert word_targets("red ball on snow, night sky", TWO_BALLS, View(0.8, 0, 1, 0.2)) == [(3, "ground")]
    mixed = Scene((TWO_BALLS.things[0], Thing("blue", "star", 0.75, 0.6, 0.1)), "sand", "day", 0.5)
    assert word_targets("the ball and the star", mixed) == [(1, 0), (4, 1)]


def test_every_named_thing_of_a_caption_has_its_targets():
    rng = np.random.default_rng(4)
    for scene in scenes(100, 9):
        text = caption(scene, FULL, rng)
        words, targets = text.split(), word_targets(text, scene)
        for index, thing in enumerate(scene.things):
            assert {words[word].strip(",") for word, which in targets if which == index} == {thing.colour, thing.shape}
        assert [word for word, _ in targets] == sorted({word for word, _ in targets})


# Counting


@pytest.mark.parametrize(("size", "count"), [(256, 60), (512, 10), (1024, 5)])
def test_the_finder_is_exact_on_clean_renders(size, count):
    for scene in scenes(count, size):
        picture = render(scene, size, size)
        result = match(find(picture), scene)
        assert exact(picture, scene), plain_caption(scene)
        assert result.iou > 0.9 and 0.93 < result.area_ratio < 1.03


def degraded(image: np.ndarray, blur: float, noise: float, quality: int = 0, seed: int = 0) -> np.ndarray:
    if blur:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    noisy = image + np.random.default_rng(seed).normal(0, noise, image.shape)
    image = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1) if quality else image


@pytest.mark.parametrize(("blur", "noise", "quality"), [(0, 6, 0), (1.5, 6, 0), (2.5, 0, 0), (0, 12, 0), (0, 0, 40)])
def test_the_finder_tolerates_errors(blur, noise, quality):
    for seed, scene in enumerate(scenes(40, 11)):
        assert exact(degraded(render(scene, 256, 256), blur, noise, quality, seed), scene), plain_caption(scene)


def pasted(scene: Scene, shrink: int, copies: int, rng: np.random.Generator) -> tuple[Scene, list[Thing]]:
    """The scene with so many smaller copies of its things, as windows repeat them, apart from all others."""
    things = list(scene.things)
    while len(things) < len(scene.things) + copies:
        model = scene.things[int(rng.integers(len(scene.things)))]
        size = model.size / shrink
        copy = Thing(model.colour, model.shape, *rng.uniform(size, 1 - size, 2).tolist(), size, model.angle)
        if all(math.hypot(copy.x - each.x, copy.y - each.y) > copy.size + each.size + 0.01 for each in things):
            things.append(copy)
    return Scene(tuple(things), scene.ground, scene.sky, scene.horizon), things


@pytest.mark.parametrize(("size", "shrink"), [(256, 2), (512, 2), (1024, 4)])
def test_planted_repeats_are_counted_exactly(size, shrink):
    rng = np.random.default_rng(size)
    for scene in scenes(4, 21):
        repeated, things = pasted(scene, shrink, 6, rng)
        found = find(degraded(render(repeated, size, size), 0, 4))
        result = match(found, scene)
        assert len(found) == len(things) and result.extra == 6 and result.missing == 0
        assert sorted(thing.colour for thing in found) == sorted(thing.colour for thing in things)
        assert match(found, repeated).shapes >= len(things) - (shrink == 2 and size == 256)


def test_touching_things_of_different_colours_are_told_apart():
    touching = Scene((Thing("red", "square", 0.35, 0.6, 0.15), Thing("yellow", "square", 0.561, 0.6, 0.15)), "sand",
                     "day", 0.5)
    assert exact(render(touching, 256, 256), touching)


@pytest.mark.parametrize(("colour", "height", "things"), [
    ("orange", 12, ["red"]),
    ("green", 12, ["green", "red"]),  # not a neighbour of red's hue
    ("orange", 80, ["orange", "red"])])  # more than a rim
def test_a_rim_in_the_neighbouring_colour_belongs_to_its_thing(colour, height, things):
    image = np.full((256, 256, 3), 200, np.uint8)
    cv2.rectangle(image, (60, 60), (180, 180), PALETTE["red"], -1)
    cv2.rectangle(image, (60, 180 - height), (120, 180), PALETTE[colour], -1)
    found = find(image)
    assert sorted(thing.colour for thing in found) == things
    assert found[0].area == pytest.approx(121**2 / 256**2, rel=0.02) or len(found) > 1


def test_empty_and_missing():
    empty = Scene((), "grass", "sunset", 0.5)
    for ground in GROUNDS:
        for sky in SKIES:
            assert find(render(Scene((), ground, sky, 0.5), 256, 256)) == []
    assert match([], TWO_BALLS).missing == 2 and not match([], TWO_BALLS).exact
    assert match([], empty).exact and math.isnan(match([], empty).area_ratio)


def test_match_without_places_goes_by_colour_and_shape():
    elsewhere = Scene((Thing("red", "ball", 0.7, 0.2, 0.15), Thing("blue", "ball", 0.2, 0.2, 0.15)), "snow", "night",
                      0.5)
    result = match(find(render(elsewhere, 256, 256)), TWO_BALLS, by_place=False)
    assert (result.extra, result.missing, result.colours, result.shapes) == (1, 1, 1, 1)


def test_two_pictures_of_different_sizes_are_compared():
    small, large = (find(render(TWO_BALLS, size, size)) for size in (256, 1024))
    result = match(large, small)
    assert result.exact and result.iou > 0.95 and result.area_ratio == pytest.approx(1, abs=0.03)
    assert iou(large, wanted(TWO_BALLS)) > 0.95


def test_a_strange_outline_is_unknown():
    bar = np.zeros((60, 200), bool)
    bar[10:40, 10:190] = True
    assert shape_of(bar) == "unknown"
    assert isinstance(wanted(TWO_BALLS)[0], Found)
