"""The drawn world on which the embedded model is trained and judged: scenes, pictures and masks.

A scene is one or two coloured things before a ground and a sky. It is rendered at native detail at any size and for
any view (a part of the world): textures have detail down to 1/2048 of the world, anchored to it, so the render of a
view is, up to resampling, the crop of a larger render. The same scene always gives the same picture.

World coordinates run from 0 to 1, x to the right, y down. The colours of things are saturated, those of grounds and
skies are not, so that things can be found again by colour (testbed/counting.py).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from testbed.lettering import Lettering, write

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

SHAPES = ("ball", "star", "square", "triangle", "heart")
GROUNDS = ("grass", "sand", "snow")
SKIES = ("day", "sunset", "night")
#: RGB of the things' colours; max - min is at least 130, and at most 60 in grounds and skies.
PALETTE: dict[str, Colour] = {"red": (214, 42, 40), "blue": (40, 86, 214), "yellow": (238, 206, 36),
                              "purple": (142, 48, 184), "green": (34, 158, 62), "orange": (242, 130, 24)}
COLOURS = tuple(PALETTE)

#: A thing is named in a caption when this share of it is in the view, or it fills FILLING of the view.
VISIBLE, FILLING = 0.35, 0.3

_RIM = 0.008  # width of a thing's dark rim, in the world
_TEXELS, _TILE = 2048, 3072  # of a texture per world side, and in all: room for shifts by up to half a world
_SUPERSAMPLING = 4

#: Two colours from the far end (top of the sky, horizon side of the ground) to the near end, and what the texture
#: adds at its brightest.
_BACKDROPS: dict[str, tuple[Colour, Colour, Colour]] = {
    "day": ((150, 178, 202), (204, 216, 224), (92, 66, 44)),
    "sunset": ((132, 118, 144), (222, 190, 168), (44, 38, 30)),
    "night": ((24, 26, 38), (58, 60, 78), (190, 188, 176)),
    "grass": ((140, 156, 122), (120, 140, 102), (44, 46, 34)),
    "sand": ((214, 202, 180), (200, 186, 158), (40, 40, 38)),
    "snow": ((224, 230, 238), (232, 236, 242), (50, 44, 36)),
}


@dataclass(frozen=True)
class Thing:
    """A coloured shape around (x, y) whose outline lies within `size` of it; `angle` in radians, clockwise."""
    colour: str
    shape: str
    x: float
    y: float
    size: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Things before a ground and a sky that meet at the height `horizon`; `texture` shifts the textures. Things stand
    before what is written."""
    things: tuple[Thing, ...]
    ground: str
    sky: str
    horizon: float
    texture: int = 0
    lettering: Lettering | None = None


@dataclass(frozen=True)
class View:
    """The part of the world that is seen."""
    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def width(self) -> float:
        return self.right - self.left

    def pixels(self, box: tuple[float, float, float, float], height: int, width: int) -> tuple[int, int, int, int]:
        """The pixels (top, left, bottom, right) that a box of the world, in the same order, touches in a picture of the
        view; empty where it is not seen."""
        top, left, bottom, right = box
        down, across = height / self.height, width / self.width
        return (max(0, math.floor((top - self.top) * down)), max(0, math.floor((left - self.left) * across)),
                min(height, math.ceil((bottom - self.top) * down)), min(width, math.ceil((right - self.left) * across)))


FULL = View()


def draw(rng: np.random.Generator) -> Scene:
    """A random scene: one or two things of different colours that neither overlap nor touch the border."""
    colours = rng.permutation(len(COLOURS))
    things: list[Thing] = []
    for colour in colours[: rng.integers(1, 3)]:
        thing = _place(rng, COLOURS[colour])
        while any(math.hypot(thing.x - other.x, thing.y - other.y) < thing.size + other.size + 0.03
                  for other in things):
            thing = _place(rng, COLOURS[colour])
        things.append(thing)
    return Scene(tuple(things), str(rng.choice(GROUNDS)), str(rng.choice(SKIES)), float(rng.uniform(0.35, 0.65)),
                 int(rng.integers(2**31)))


def _place(rng: np.random.Generator, colour: str) -> Thing:
    size = float(rng.uniform(0.1, 0.2))
    edge = size + 0.02
    highest = edge if rng.random() < 0.25 else max(edge, 0.33)
    return Thing(colour, str(rng.choice(SHAPES)), float(rng.uniform(edge, 1 - edge)),
                 float(rng.uniform(highest, 1 - edge)), size, float(rng.uniform(-0.3, 0.3)))


def zoomed(rng: np.random.Generator) -> View:
    """A random square view with a side of 1/4 to 1."""
    side = float(2 ** rng.uniform(-2, 0))
    top, left = (float(rng.uniform(0, 1 - side)) for _ in range(2))
    return View(top, left, top + side, left + side)


def held_out(scene: Scene) -> bool:
    """Whether what the scene shows (not where) is kept out of training: one scene in ten."""
    names = sorted(f"{thing.colour} {thing.shape}" for thing in scene.things)
    return zlib.crc32(" ".join([*names, scene.ground, scene.sky]).encode()) % 10 == 0


# Pictures


def render(scene: Scene, height: int, width: int, view: View = FULL) -> Picture:
    """The picture of a view of the scene, RGB [height, width, 3]; a view of another aspect ratio is stretched."""
    picture = np.empty((height, width, 3), np.float32)
    edge = min(max((scene.horizon - view.top) / view.height * height, 0.0), float(height))  # in rows of pixels
    above, below = math.ceil(edge), math.floor(edge)
    if above:
        picture[:above] = _backdrop(scene, scene.sky, _part(view, height, width, 0, 0, above, width), above, width)
    if below < height:
        ground = _backdrop(scene, scene.ground, _part(view, height, width, below, 0, height, width),
                           height - below, width)
        if above > below:
            ground[0] += (edge - below) * (picture[below] - ground[0])
        picture[below:] = ground
    if scene.lettering is not None:
        write(picture, scene.lettering, view)
    for thing in scene.things:
        _paint(picture, scene, thing, view)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _part(view: View, height: int, width: int, top: int, left: int, bottom: int, right: int) -> View:
    """The view of a box of pixels of a height x width picture of `view`."""
    down, across = view.height / height, view.width / width
    return View(view.top + top * down, view.left + left * across, view.top + bottom * down,
                view.left + right * across)


def _backdrop(scene: Scene, name: str, view: View, height: int, width: int) -> Array:
    """A ground or a sky alone, [height, width, 3]."""
    far, near, texture = (np.array(colour, np.float32) for colour in _BACKDROPS[name])
    down = view.top + (np.arange(height, dtype=np.float32)[:, None] + 0.5) * (view.height / height)
    start, length = (0, scene.horizon) if name in SKIES else (scene.horizon, 1 - scene.horizon)
    rows = far + np.clip((down - start) / length, 0, 1) * (near - far)
    picture = _texture(scene, name, view, height, width)[:, :, None] * (texture / 127)
    return (picture + rows[:, None]).astype(np.float32)


def _paint(picture: Array, scene: Scene, thing: Thing, view: View) -> None:
    """Paints a thing over the picture [H, W, 3] of a view, in place."""
    height, width = picture.shape[:2]
    down, across = height / view.height, width / view.width
    top, left, bottom, right = view.pixels((thing.y - thing.size, thing.x - thing.size, thing.y + thing.size,
                                            thing.x + thing.size), height, width)
    if top >= bottom or left >= right:
        return
    part, rows, columns = _part(view, height, width, top, left, bottom, right), bottom - top, right - left
    inside = _stencil(thing, part, rows * _SUPERSAMPLING, columns * _SUPERSAMPLING)
    rim = np.zeros(inside.shape, np.float32)
    thickness = 2 * _RIM * _SUPERSAMPLING * math.sqrt(down * across)
    cv2.polylines(rim, [_points(thing, part, *inside.shape)], True, 1.0, max(1, round(thickness)), shift=8)
    rim *= inside
    cover, dark = (_shrunk(stencil, rows, columns) for stencil in (inside, rim))
    y = (part.top + (np.arange(rows, dtype=np.float32)[:, None] + 0.5) / down - thing.y) / thing.size
    x = (part.left + (np.arange(columns, dtype=np.float32)[None] + 0.5) / across - thing.x) / thing.size
    light = np.exp(-6 * ((x + 0.25) ** 2 + (y + 0.3) ** 2)) * 0.38
    shade = 0.97 - 0.13 * (x + y) + _texture(scene, "surface", part, rows, columns) * (0.1 / 127)
    np.divide(dark, np.maximum(cover, 1e-3), out=dark)
    shade *= 1 - 0.38 * dark
    light *= 1 - dark
    box = picture[top:bottom, left:right]
    colour = np.array(PALETTE[thing.colour], np.float32)
    colours = (shade * (1 - light))[:, :, None] * colour + (255 * light)[:, :, None]
    box += cover[:, :, None] * (colours - box)


def _stencil(thing: Thing, view: View, height: int, width: int) -> Array:
    """1 inside a thing and 0 outside, [height, width], not antialiased."""
    stencil = np.zeros((height, width), np.float32)
    cv2.fillPoly(stencil, [_points(thing, view, height, width)], 1.0, shift=8)
    return stencil


def _shrunk(stencil: Array, rows: int, columns: int) -> Array:
    """The share of each cell [rows, columns] that a stencil [H, W] covers."""
    return np.asarray(cv2.resize(stencil, (columns, rows), interpolation=cv2.INTER_AREA), np.float32)


def _points(thing: Thing, view: View, height: int, width: int) -> NDArray[np.int32]:
    """The outline in pixels with 8 fractional bits [N, 2], pixel centres at whole numbers."""
    turn = np.array([[math.cos(thing.angle), math.sin(thing.angle)], [-math.sin(thing.angle), math.cos(thing.angle)]])
    world = outline(thing.shape) @ turn * thing.size + (thing.x - view.left, thing.y - view.top)
    return np.rint((world * (width / view.width, height / view.height) - 0.5) * 256).astype(np.int32)


@cache
def outline(shape: str) -> NDArray[np.float64]:
    """The outline of a shape of size 1 around (0, 0) as a polygon [N, 2] of (x, y)."""
    turn = np.arange(128) * (2 * math.pi / 128)
    if shape == "ball":
        return np.stack([np.sin(turn), -np.cos(turn)], 1) * 0.88
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) - 2.5
        return np.stack([x, y], 1) / np.hypot(x, y).max()
    count, inner = {"star": (10, 0.47), "square": (4, 1.0), "triangle": (3, 1.0)}[shape]
    corner = np.arange(count)
    turn = corner * (2 * math.pi / count) + (math.pi / 4 if shape == "square" else 0.0)
    return np.stack([np.sin(turn), -np.cos(turn)], 1) * np.where(corner % 2, inner, 1.0)[:, None]


# Textures


def _texture(scene: Scene, name: str, view: View, height: int, width: int) -> Array:
    """A texture in a view [height, width], -127 to 127, mostly near 0."""
    pyramid = _pyramid(name)
    density = min(width / view.width, height / view.height) * 0.999
    level = min(len(pyramid) - 1, max(0, math.floor(math.log2(_TEXELS / density))))
    texels = _TEXELS >> level
    shifts = scene.texture % 31 / 64, scene.texture // 31 % 31 / 64  # whole texels of the coarse levels too
    down, across = texels * view.height / height, texels * view.width / width
    place = np.array([[across, 0, (view.left + shifts[0]) * texels + (across - 1) / 2],
                      [0, down, (view.top + shifts[1]) * texels + (down - 1) / 2]])
    patch = cv2.warpAffine(pyramid[level], place, (width, height), borderMode=cv2.BORDER_REFLECT_101,
                           flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return patch.astype(np.float32) - 128


@cache
def _pyramid(name: str) -> list[Picture]:
    """A texture [_TILE, _TILE] around 128, and its halvings."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    levels = [np.clip(np.rint(_TEXTURES[name](rng)) + 128, 0, 255).astype(np.uint8)]
    while levels[-1].shape[0] > 100:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return levels


def warm_textures() -> None:
    """Makes all textures, for processes that are forked later to share."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_pyramid, _TEXTURES))


def _noise(rng: np.random.Generator, coarsest: int, roughness: float, stretch: int = 1) -> Array:
    """Noise of standard deviation 1 with cells from `coarsest` texels down to 2, x times `stretch`.

    Each halving of the cells has `roughness` times the amplitude.
    """
    noise, weight, cell = np.zeros((_TILE, _TILE), np.float32), 1.0, coarsest
    while cell >= 2:
        grid = rng.standard_normal((_TILE // cell + 2, _TILE // (cell * stretch) + 2), dtype=np.float32)
        noise += weight * cv2.resize(grid, (_TILE, _TILE), interpolation=cv2.INTER_CUBIC)
        weight, cell = weight * roughness, cell // 2
    return noise / noise.std()


def _dots(rng: np.random.Generator, count: int, radii: tuple[float, float], lights: tuple[float, float]) -> Array:
    """Small discs on 0; most are small."""
    dots = np.zeros((_TILE, _TILE), np.float32)
    for x, y, radius, light in zip(*rng.integers(0, _TILE * 16, (2, count)).tolist(),
                                   (radii[0] * (radii[1] / radii[0]) ** rng.random(count) ** 2).tolist(),
                                   rng.uniform(*lights, count).tolist(), strict=True):
        cv2.circle(dots, (x, y), round(radius * 16), light, -1, cv2.LINE_8, 4)
    return dots


def _grass(rng: np.random.Generator) -> Array:
    """Blades that start anywhere and lean a little, light over dark."""
    field = 9 * _noise(rng, 512, 0.6)
    for light in np.linspace(-70, 70, 15):
        foot = rng.uniform(0, _TILE, (3000, 1, 2))
        tip = rng.normal((0, -1), (0.35, 0.25), (3000, 1, 2)) * rng.uniform(16, 52, (3000, 1, 1))
        middle = tip * (0.4, 0.55)
        blades = np.rint(np.concatenate([foot, foot + middle, foot + tip], 1) * 16).astype(np.int32)
        cv2.polylines(field, list(blades), False, float(light + rng.normal(0, 5)), 3, cv2.LINE_8, 4)
    return np.asarray(cv2.GaussianBlur(field, (0, 0), 0.7), np.float32)


def _sand(rng: np.random.Generator) -> Array:
    """Ripples, grain and pebbles."""
    waves = np.sin(np.arange(_TILE, dtype=np.float32)[:, None] * (2 * math.pi / 96) + 2.2 * _noise(rng, 512, 0.4))
    return 14 * waves + 12 * _noise(rng, 16, 1.0) + _dots(rng, 9000, (2, 7), (-90, 60))


def _snow(rng: np.random.Generator) -> Array:
    """Soft drifts, grain and sparkles."""
    return 26 * _noise(rng, 384, 0.45, 2) - 18 + 7 * _noise(rng, 8, 1.0) + _dots(rng, 5000, (2, 6), (30, 120))


def _clouds(rng: np.random.Generator) -> Array:
    return 62 * np.clip(_noise(rng, 512, 0.55, 2) - 0.35, 0, 1.6) + 2 * _noise(rng, 16, 1.0)


def _streaks(rng: np.random.Generator) -> Array:
    return 34 * np.clip(_noise(rng, 192, 0.6, 8), -1.2, 2.2) + 2 * _noise(rng, 16, 1.0)


def _stars(rng: np.random.Generator) -> Array:
    return 4 * _noise(rng, 512, 0.6) + cv2.GaussianBlur(_dots(rng, 1500, (2, 9), (60, 125)), (0, 0), 1)


_TEXTURES: dict[str, Callable[[np.random.Generator], Array]] = {
    "grass": _grass, "sand": _sand, "snow": _snow, "day": _clouds, "sunset": _streaks, "night": _stars,
    "surface": lambda rng: 24 * _noise(rng, 256, 0.85),
}


# Masks


def thing_masks(scene: Scene, view: View, rows: int, columns: int) -> Array:
    """The share of every cell of a view that each thing covers, [things, rows, columns]."""
    fine = max(_SUPERSAMPLING, math.ceil(512 / min(rows, columns)))
    covers = [_shrunk(_stencil(thing, view, rows * fine, columns * fine), rows, columns) for thing in scene.things]
    return np.array(covers, np.float32).reshape(-1, rows, columns)


def sky_mask(scene: Scene, view: View, rows: int, columns: int) -> Array:
    """The share of every cell that shows sky, [rows, columns]."""
    return masks(scene, view, rows, columns)["sky"]


def ground_mask(scene: Scene, view: View, rows: int, columns: int) -> Array:
    """The share of every cell that shows ground, [rows, columns]."""
    return masks(scene, view, rows, columns)["ground"]


def masks(scene: Scene, view: View, rows: int, columns: int) -> dict[int | str, Array]:
    """All masks [rows, columns]: of the things by their index, of "ground" and of "sky"; together they make 1."""
    things = thing_masks(scene, view, rows, columns)
    rest = 1 - things.sum(0)
    horizon = (scene.horizon - view.top) / view.height * rows
    above = np.clip(horizon - np.arange(rows, dtype=np.float32), 0, 1)[:, None]
    return {**dict(enumerate(things)), "ground": rest * (1 - above), "sky": rest * above}


# Captions


def shares(scene: Scene, view: View) -> dict[int | str, float]:
    """The share of the view that each thing (by its index), "ground" and "sky" fill."""
    return {which: float(mask.mean()) for which, mask in masks(scene, view, 64, 64).items()}


def cut(scene: Scene, view: View) -> bool:
    """Whether the border of the view cuts a thing."""
    for thing in scene.things:
        right, left = view.right - thing.x, thing.x - view.left
        bottom, top = view.bottom - thing.y, thing.y - view.top
        if -thing.size < min(right, left, bottom, top) < thing.size:
            return True
    return False


def visible(scene: Scene, view: View) -> list[int]:
    """The indices of the things that are in the view enough to be named."""
    seen = shares(scene, view)
    world = thing_masks(scene, FULL, 64, 64).mean((1, 2))
    return [index for index in range(len(scene.things))
            if seen[index] * view.height * view.width >= VISIBLE * world[index] or seen[index] >= FILLING]
