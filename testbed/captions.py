"""Captions of drawn scenes, in many wordings, and what each of their words is about."""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np

from testbed.scenes import COLOURS, FULL, SHAPES, Scene, Thing, View, cut, shares, visible

#: Above this share of the view a thing's shape cannot be told any more.
INSIDE = 0.85
#: A ground or a sky is named when it fills this share of the view.
NAMED = 0.08


def plain_caption(scene: Scene) -> str:
    """The whole scene in fixed words: "a red ball and a blue star on snow, night sky"."""
    things = " and ".join(f"{_article(thing.colour)} {thing.colour} {thing.shape}" for thing in scene.things)
    return f"{things} on {scene.ground}, {scene.sky} sky"


def caption(scene: Scene, view: View, rng: np.random.Generator) -> str:
    """What is visible in a view, in one of many wordings, lower case."""
    def pick(*choices: str) -> str:
        return choices[int(rng.integers(len(choices)))]

    seen, things = shares(scene, view), visible(scene, view)
    places = {name for name in ("ground", "sky") if seen[name] >= NAMED}
    # Unmarked, a cut thing looks like what a caption with ground and sky asks for; windows' prompts, though, are so.
    close = cut(scene, view) and rng.random() < (0.95 if len(places) == 2 else 0.7)
    close = close or (view.width < 0.6 and rng.random() < 0.4)
    if not things:
        places = places or {max(("ground", "sky"), key=seen.__getitem__)}
        text = _empty(scene, places, pick)
    elif max(seen[index] for index in things) >= INSIDE:
        thing = scene.things[max(things, key=seen.__getitem__)]
        text = pick(f"a {thing.colour} surface", f"{thing.colour} surface", f"a {thing.colour} {thing.shape}")
        text, close = text.replace("a orange", "an orange"), True
    else:
        names = [_name(scene.things[index], pick) for index in rng.permutation(things)]
        text = pick(" and ", " and ", " next to ", ", ", " beside ", " with ").join(names)
        text += "" if rng.random() < 0.08 else _setting(scene, places, pick)
    if close:
        return f"close-up of {text}" if rng.random() < 0.5 else f"{text}, close-up"
    return pick("", "", "", "", "", "a drawing of ", "a picture of ") + text


def _article(colour: str) -> str:
    return "an" if colour == "orange" else "a"


def _name(thing: Thing, pick: Callable[..., str]) -> str:
    article = pick(_article(thing.colour), _article(thing.colour), _article(thing.colour), "one", "the", "")
    return f"{article} {thing.colour} {thing.shape}".strip()


def _setting(scene: Scene, places: set[str], pick: Callable[..., str]) -> str:
    """Where the things are, to follow their names."""
    ground, sky = scene.ground, scene.sky
    if places == {"ground"}:
        return pick(f" on {ground}", f" on the {ground}", f", {ground}")
    if places == {"sky"}:
        return pick(f", {sky} sky", f" in a {sky} sky", f" in the {sky} sky", f" under a {sky} sky")
    if not places:
        return ""
    time = {"day": "by day", "sunset": "at sunset", "night": "at night"}[sky]
    if pick("", "time"):
        return pick(f" on {ground} ", f" on the {ground} ") + pick(f"under a {sky} sky", time, time)
    return pick(f" on {ground}, ", f" on the {ground}, ", f", {ground}, ") + f"{sky} sky"


def _empty(scene: Scene, places: set[str], pick: Callable[..., str]) -> str:
    """A view without things."""
    ground, sky = scene.ground, scene.sky
    if places == {"ground"}:
        return pick(ground, ground, f"the {ground}")
    if places == {"sky"}:
        return pick(f"a {sky} sky", f"{sky} sky", f"the {sky} sky")
    return pick(f"{ground} under a {sky} sky", f"{ground}, {sky} sky", f"{ground} and a {sky} sky")


def word_targets(text: str, scene: Scene, view: View = FULL) -> list[tuple[int, int | str]]:
    """Which region each word of a caption is about: (index in text.split(), key of `masks`).

    Colours are told apart by themselves, because two things never share one; a shape belongs to the thing whose
    colour stands right before it, or, without a colour, to the only thing of that shape. Words about what does not
    show in the view are left out.
    """
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    owner = {thing.colour: index for index, thing in enumerate(scene.things)}
    seen = shares(scene, view)
    targets: list[tuple[int, int | str | None]] = []
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if word in COLOURS:
            targets.append((index, owner.get(word)))
        elif word in (*SHAPES, "surface"):
            alike = [which for which, thing in enumerate(scene.things) if thing.shape == word]
            which = owner.get(before) if before in COLOURS else alike[0] if len(alike) == 1 else None
            targets.append((index, which))
        elif word == scene.ground:
            targets.append((index, "ground"))
        elif word in (scene.sky, "sky"):
            targets.append((index, "sky"))
    return [(index, which) for index, which in targets if which is not None and seen[which] > 0]
