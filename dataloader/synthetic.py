"""Drawn RGB-thermal road scenes with exact labels, in which neither modality alone is enough.

People are warm but hide in the dark, in glare and in fog; cones and kerbs have the road's own
temperature and show in rgb only; warm machines, windows and manholes are no people; on hot days
people are as warm as the street. All sizes are relative: any image from 32x32 on.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from utils.errors import InputError
from utils.image import write_png

BACKGROUND, PERSON, CAR, CONE, KERB = range(5)  # the classes of configs/config_demo.yaml
SPLITS = ("train", "val", "test")

_VERSION = 1  # of the drawing; a folder drawn by another version is not the same data set
_DESCRIPTION = "scenes.json"  # what a folder of drawn scenes was drawn from
_FOLDERS = ("RGB", "Modal", "Label")  # in the order of a Scene's fields
_EYE_M = 1.6  # height of the camera above the road
_FOCAL_M = 2.1  # distance of ground that is one image height below the horizon
_FAR_M = 45.0  # distance of sky and skyline
_CIRCLE = np.array([(math.cos(turn), math.sin(turn)) for turn in np.arange(24) * math.pi / 12])

_PAINTS = (
    (0.85, 0.85, 0.86), (0.08, 0.08, 0.09), (0.62, 0.1, 0.1), (0.1, 0.16, 0.45), (0.5, 0.52, 0.55),
    (0.75, 0.68, 0.3), (0.1, 0.35, 0.25),
)  # fmt: skip
_CLOTHES = (
    (0.75, 0.12, 0.14), (0.12, 0.22, 0.6), (0.1, 0.1, 0.12), (0.85, 0.83, 0.8), (0.15, 0.4, 0.2),
    (0.8, 0.65, 0.2), (0.4, 0.2, 0.45), (0.3, 0.26, 0.22), (0.2, 0.5, 0.6), (0.75, 0.42, 0.2),
)  # fmt: skip
_WALLS = ((0.55, 0.42, 0.35), (0.62, 0.6, 0.55), (0.45, 0.46, 0.5), (0.5, 0.32, 0.26))
_PAVINGS = ((0.5, 0.47, 0.44), (0.42, 0.42, 0.42), (0.25, 0.4, 0.18))
_SKIN, _GLASS = (0.75, 0.56, 0.45), (0.16, 0.2, 0.25)
_RED_LIGHT, _WHITE_LIGHT = (1.0, 0.12, 0.08), (1.0, 0.93, 0.75)

Color = Sequence[float] | np.ndarray  # reflected red, green, blue in [0, 1]
Points = Sequence[tuple[float, float]] | np.ndarray  # (N, 2), column and row


class Scene(NamedTuple):
    """One registered pair with its label."""

    rgb: np.ndarray  # (H, W, 3) uint8
    thermal: np.ndarray  # (H, W) uint8, warmer is brighter
    label: np.ndarray  # (H, W) uint8 in 0..4


class Weather(NamedTuple):
    """What all things of a scene share; temperatures in [0, 1] of the thermal grey range."""

    is_night: bool
    ground: float  # temperature of the ground and of all that stands there unheated
    body: float  # temperature of skin
    ambient: float  # light that is everywhere
    fog: float  # extinction per metre
    glare: float  # strength of one blinding spot, 0 = none
    sun: float  # metres of shadow to the right per metre of height


class Street(NamedTuple):
    """A road in perspective, seen in an image of height x width pixels."""

    height: int
    width: int
    half_road: float  # metres from the middle to a kerb
    horizon: float  # fraction of the height
    vanishing: float  # fraction of the width
    bend: float  # of the road, image heights at the horizon

    def point(self, across: float, near: float, up: float = 0.0) -> tuple[float, float]:
        """Pixel of a point: metres across and up; near = image heights below the horizon."""
        side = across * near / _EYE_M + self.bend * max(1 - near / 0.6, 0.0) ** 2
        row = self.horizon + near * (1 - up / _EYE_M)
        return self.vanishing * self.width + side * self.height, row * self.height

    def across(self, column: float, near: float) -> float:
        """Metres across of a column, a fraction of the width, where the road is straight."""
        return _EYE_M / near * (column - self.vanishing) * self.width / self.height


class Item(NamedTuple):
    """Something that stands on the ground."""

    kind: str  # a key of _KINDS
    x: float  # column of its middle; pixels
    foot: float  # row at which it stands; pixels
    metre: float  # pixels per metre there


class Light(NamedTuple):
    """A lamp: part is the painted lamp, which must be in sight; None = its light on things."""

    x: float
    y: float
    radius: float  # pixels
    strength: float
    color: Color
    part: int | None


class Canvas:
    """For each pixel the part of a thing that is seen there; what is painted later is in front.

    Color, temperature and label are all looked up from the same part, so a label is exact.
    """

    def __init__(self, height: int, width: int) -> None:
        self.parts = np.zeros((height, width), np.uint16)
        self.shade = np.zeros((height, width), np.uint8)  # 1 where the ground lies in shadow
        self.lights: list[Light] = []
        self._looks: list[tuple[float, ...]] = [(0.0,) * 6]  # part 0: what nobody paints over
        self._labels: list[int] = [BACKGROUND]

    def add_part(
        self,
        color: Color,
        temperature: float,
        glow: float = 0.0,
        *,
        distance: float = 0.0,
        label: int = BACKGROUND,
    ) -> int:
        """Number of a new part, to paint with.

        Args:
            glow: share of color that shines by itself.
            distance: metres to the camera; 0 = part of the ground, whose row tells the distance.
        """
        self._looks.append((*color, temperature, glow, distance))
        self._labels.append(label)
        return len(self._labels) - 1

    def polygon(self, points: Points, part: int) -> None:
        _fill(self.parts, points, part)

    def looks(self) -> np.ndarray:
        """(H, W, 6) float32: red, green, blue, temperature, glow, distance."""
        return np.array(self._looks, np.float32)[self.parts]

    def label(self) -> np.ndarray:
        """(H, W) uint8 class of each pixel."""
        return np.array(self._labels, np.uint8)[self.parts]

    def color_near(self, x: float, y: float, reach: float) -> np.ndarray:
        """(3,) mean color of five points around a place, as painted so far."""
        height, width = self.parts.shape
        total = np.zeros(3)
        for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)):
            row = min(max(int(y + dy * reach), 0), height - 1)
            column = min(max(int(x + dx * reach), 0), width - 1)
            total += self._looks[self.parts[row, column]][:3]
        return total / 5


def _fill(image: np.ndarray, points: Points, value: int) -> None:
    corners = np.round(np.asarray(points, np.float64) * 16).astype(np.int32)
    cv2.fillPoly(image, [corners], value, cv2.LINE_8, 4)


class Pen:
    """Paints one item in metres: x to the right (or left) of its middle, y above its foot."""

    def __init__(self, canvas: Canvas, item: Item) -> None:
        self.canvas, self.item = canvas, item
        self.sign = 1.0  # -1.0 mirrors what is painted next

    def part(self, color: Color, temperature: float, glow: float = 0.0) -> int:
        distance = _FOCAL_M * self.canvas.parts.shape[0] / (_EYE_M * self.item.metre)
        label = _KINDS[self.item.kind].label
        return self.canvas.add_part(color, temperature, glow, distance=distance, label=label)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a place on the item."""
        item = self.item
        return item.x + self.sign * x * item.metre, item.foot - y * item.metre

    def polygon(self, points: Points, part: int) -> None:
        metre = self.item.metre
        scaled = np.asarray(points) * (self.sign * metre, -metre)
        self.canvas.polygon(scaled + (self.item.x, self.item.foot), part)

    def box(self, left: float, bottom: float, right: float, top: float, part: int) -> None:
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], part)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, part: int) -> None:
        self.polygon(_CIRCLE * (radius_x, radius_y) + (x, y), part)

    def light(
        self, x: float, y: float, radius: float, strength: float, color: Color, part: int | None
    ) -> None:
        radius *= self.item.metre
        self.canvas.lights.append(Light(*self.at(x, y), radius, strength, color, part))


def is_night(index: int) -> bool:
    """Every second scene is at night, so that each list of scenes holds both."""
    return index % 2 == 1


def draw_scene(index: int, *, height: int, width: int, seed: int) -> Scene:
    """Draw scene number index of a seed; it does not depend on what was drawn before.

    Raises:
        InputError: a side below 32 pixels, a negative index or seed.
    """
    if min(height, width) < 32:
        raise InputError(f"a scene is at least 32x32 pixels, got {height}x{width}")
    if min(index, seed) < 0:
        raise InputError(f"index and seed are 0 or more, got index {index}, seed {seed}")
    rng = np.random.default_rng([seed, index])
    weather = _choose_weather(rng, is_night(index))
    street = Street(
        height,
        width,
        half_road=rng.uniform(1.9, 2.9),
        horizon=rng.uniform(0.33, 0.4),
        vanishing=rng.uniform(0.35, 0.65),
        bend=rng.uniform(-0.12, 0.12),
    )
    canvas = Canvas(height, width)
    _paint_sky(canvas, street, weather, rng)
    _paint_ground(canvas, street, weather, rng)
    _paint_houses(canvas, street, weather, rng)
    _paint_kerbs(canvas, street, weather, rng)
    draw_items(canvas, _place_items(street, rng), weather, rng)
    looks = canvas.looks()
    thermal = _render_thermal(looks[..., 3], rng)
    return Scene(_render_rgb(canvas, looks, street, weather, rng), thermal, canvas.label())


def draw_items(canvas: Canvas, items: Sequence[Item], weather: Weather, rng: Generator) -> None:
    """Paint items from the farthest to the nearest, whatever their order."""
    if not weather.is_night:
        for item in items:
            _paint_shadow(canvas, item, weather)
    for item in sorted(items, key=lambda item: item.foot):
        _KINDS[item.kind].draw(Pen(canvas, item), weather, rng)


def _choose_weather(rng: Generator, night: bool) -> Weather:
    foggy, hot, glaring = rng.random(3) < (0.25, 0.45, 0.3)
    if night:
        ground, excess = rng.uniform(0.18, 0.32), rng.uniform(0.35, 0.5)
    elif hot:  # thermal crossover: people as warm as the street
        ground, excess = rng.uniform(0.5, 0.62), rng.uniform(-0.05, 0.06)
    else:
        ground, excess = rng.uniform(0.25, 0.4), rng.uniform(0.25, 0.4)
    return Weather(
        is_night=night,
        ground=ground,
        body=ground + excess,
        ambient=rng.uniform(0.2, 0.3) if night else rng.uniform(0.8, 1.1),
        fog=rng.uniform(0.04, 0.07 if night else 0.13) if foggy else 0.0,
        glare=rng.uniform(1.0, 1.8) if glaring else 0.0,
        sun=rng.uniform(-0.9, 0.9),
    )


def _jitter(rng: Generator, color: Color, spread: float = 0.05) -> np.ndarray:
    return np.clip(np.asarray(color) + rng.uniform(-spread, spread, 3), 0.02, 1.0)


def _pick(rng: Generator, colors: Sequence[Color]) -> np.ndarray:
    return _jitter(rng, colors[rng.integers(len(colors))])


def _paint_sky(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
    """Cold sky, and a skyline of far houses and trees."""
    right, end = street.width, (street.horizon + 0.02) * street.height
    day, night = ((0.4, 0.6, 0.88), (0.8, 0.86, 0.9)), ((0.1, 0.12, 0.2), (0.3, 0.25, 0.25))
    top, low = np.array(night if weather.is_night else day)
    for band in np.linspace(0, 1, 12, endpoint=False):
        part = canvas.add_part(top + (low - top) * band, 0.03 + 0.07 * band, distance=_FAR_M)
        canvas.polygon([(0, band * end), (right, band * end), (right, end), (0, end)], part)
    for _ in range(rng.integers(4, 8)):
        color = _jitter(rng, np.full(3, rng.uniform(0.25, 0.55)))
        heat = 0.6 * weather.ground + rng.uniform(0, 0.1)
        part = canvas.add_part(color, heat, distance=_FAR_M)
        middle = (rng.uniform(0, right), end)
        size = rng.uniform((0.04, 0.07), (0.1, 0.16)) * street.height
        square = np.array([(-1, 0), (-1, -1), (1, -1), (1, 0)])
        canvas.polygon((square if rng.random() < 0.5 else _CIRCLE) * size + middle, part)


def _paint_ground(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
    """Road, pavement or grass and road marks of one temperature; warm manholes."""
    right, bottom, top = street.width, street.height, (street.horizon + 0.01) * street.height
    beside = canvas.add_part(_pick(rng, _PAVINGS), weather.ground)
    canvas.polygon([(0, top), (right, top), (right, bottom), (0, bottom)], beside)
    road = canvas.add_part(np.full(3, rng.uniform(0.24, 0.38)), weather.ground)
    steps, half = np.geomspace(0.02, 0.75, 10), street.half_road
    left_edge = [street.point(-half, near) for near in steps]
    canvas.polygon(left_edge + [street.point(half, near) for near in steps[::-1]], road)
    mark = canvas.add_part(_jitter(rng, (0.75, 0.75, 0.72)), weather.ground)
    middle, phase = rng.uniform(-0.5, 0.5), rng.uniform(0, 3)
    for start in (3.0, 7.0, 11.0, 15.0):  # metres
        near, far = _FOCAL_M / (start + phase), _FOCAL_M / (start + phase + 2)
        corners = ((-0.08, near), (0.08, near), (0.08, far), (-0.08, far))
        canvas.polygon([street.point(middle + x, at) for x, at in corners], mark)
    for _ in range(rng.integers(0, 3)):
        cover = canvas.add_part((0.16, 0.15, 0.15), rng.uniform(0.6, 0.95))
        near = rng.uniform(0.2, 0.5)
        radii = np.array((0.35, 0.1)) * near * street.height / _EYE_M
        canvas.polygon(_CIRCLE * radii + street.point(rng.uniform(-0.8, 0.8) * half, near), cover)


def _paint_kerbs(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
    """One or two raised kerbs along the road, as warm as the ground, plain or red and white."""
    stone = np.full(3, rng.uniform(0.68, 0.85))
    tints = (stone, np.array((0.7, 0.25, 0.2)) if rng.random() < 0.25 else stone - 0.06)
    fronts = [canvas.add_part(0.72 * tint, weather.ground, label=KERB) for tint in tints]
    tops = [canvas.add_part(tint, weather.ground, label=KERB) for tint in tints]
    steps = np.geomspace(0.06, 0.72, 9)
    for side in ((-1,), (1,), (-1, 1), (-1, 1))[rng.integers(4)]:
        inner, outer = side * street.half_road, side * (street.half_road + 0.4)
        for i in range(8):
            far, near = steps[i : i + 2]
            low = [street.point(inner, far), street.point(inner, near)]
            high = [street.point(inner, near, 0.16), street.point(inner, far, 0.16)]
            back = [street.point(outer, far, 0.16), street.point(outer, near, 0.16)]
            canvas.polygon(high + back, tops[i % 2])
            canvas.polygon(low + high, fronts[i % 2])


def _paint_houses(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
    """Rows of fronts in perspective on both sides, from the back to the camera."""
    for side in (-1, 1):
        across, end = side * (street.half_road + rng.uniform(2.2, 3.5)), rng.uniform(28, 40)
        while end > 9:  # metres
            start = max(end - rng.uniform(6, 11), 4.0)
            if rng.random() < 0.75:
                _paint_front(canvas, street, weather, (across, start, end), rng)
            end = start


def _paint_front(
    canvas: Canvas,
    street: Street,
    weather: Weather,
    place: tuple[float, float, float],
    rng: Generator,
) -> None:
    """A wall at place (across, start, end; metres); any window may be warm and any may be lit."""
    across, start, end = place
    distance, tall = (start + end) / 2, rng.uniform(4.5, 9.5)

    def quad(first: float, last: float, low: float, high: float) -> Points:
        corners = ((first, low), (first, high), (last, high), (last, low))
        return [street.point(across, _FOCAL_M / at, up) for at, up in corners]

    heat = weather.ground + rng.uniform(-0.06, 0.08)
    wall = canvas.add_part(_pick(rng, _WALLS), heat, distance=distance)
    canvas.polygon(quad(start, end, 0, tall), wall)
    night = weather.is_night
    dark, lit = ((0.2, 0.24, 0.3), (0.95, 0.85, 0.55)) if night else ((0.3, 0.38, 0.46), (0.7,) * 3)
    panes = [
        canvas.add_part(dark, weather.ground - 0.1, distance=distance),
        canvas.add_part(dark, rng.uniform(0.55, 0.9), distance=distance),
        canvas.add_part(lit, rng.uniform(0.3, 0.6), 0.8 * night, distance=distance),
    ]
    spacing = max(3.0, (end - start) / 3)
    for column in np.arange(start + 0.5, end - 1.2, spacing):
        for floor in np.arange(1.0, min(tall, 7.5) - 1.4, 2.8):
            pane = panes[max(int(rng.integers(5)) - 2, 0)]
            canvas.polygon(quad(column, column + spacing / 2, floor, floor + 1.5), pane)


def _place_items(street: Street, rng: Generator) -> list[Item]:
    """People, cars, cones and what resembles or covers them, no two at nearly the same place."""
    wanted = ["person"] * rng.integers(1, 5) + ["cone"] * rng.integers(1, 5)
    wanted += [("car_end", "car_side")[rng.integers(2)] for _ in range(rng.integers(0, 3))]
    wanted += ["poster"] * (rng.random() < 0.35) + ["machine"] * (rng.random() < 0.5)
    wanted += ["bush"] * (rng.random() < 0.4) + ["sign"] * (rng.random() < 0.4)
    wanted += ["lamp"] * rng.integers(0, 3) + ["tree"] * rng.integers(0, 3)
    items: list[Item] = []
    for name in wanted:
        kind = _KINDS[name]
        for _ in range(6):  # tries
            near = rng.uniform(*kind.near)
            across = street.half_road * kind.side + rng.uniform(*kind.spread)
            across *= 1 if rng.random() < 0.5 else -1
            across = max(min(across, street.across(0.95, near)), street.across(0.05, near))
            item = Item(name, *street.point(across, near), near * street.height / _EYE_M)
            if all(_overlap(item, other) < 0.45 for other in items):
                items.append(item)
                break
    return items


def _box(item: Item) -> tuple[float, float, float, float]:
    """Left, right, top and foot of an item; pixels."""
    kind = _KINDS[item.kind]
    half = kind.width * item.metre / 2
    return item.x - half, item.x + half, item.foot - kind.height * item.metre, item.foot


def _overlap(first: Item, second: Item) -> float:
    """Shared area of two items' boxes over the smaller one's."""
    (left, right, top, foot), (left2, right2, top2, foot2) = _box(first), _box(second)
    shared = max(min(right, right2) - max(left, left2), 0)
    shared *= max(min(foot, foot2) - max(top, top2), 0)
    return shared / min((right - left) * (foot - top), (right2 - left2) * (foot2 - top2))


def _paint_shadow(canvas: Canvas, item: Item, weather: Weather) -> None:
    left, right, top, foot = _box(item)
    half, tall = (right - left) / 2, foot - top
    _fill(canvas.shade, _CIRCLE * (half, 0.12 * item.metre) + (item.x, foot), 1)
    tip = (item.x + weather.sun * tall, foot + 0.2 * tall)
    ends = [(tip[0] + 0.7 * half, tip[1]), (tip[0] - 0.7 * half, tip[1])]
    _fill(canvas.shade, [(left, foot), (right, foot), *ends], 1)


def _draw_person(pen: Pen, weather: Weather, rng: Generator) -> None:
    """Warm; at night dressed nearly in the colors of what is behind."""
    colors = [_pick(rng, _CLOTHES), _pick(rng, _CLOTHES), _jitter(rng, _SKIN)]
    if weather.is_night:
        for i, up in enumerate((0.4, 1.1, 1.6)):  # metres: legs, upper body, head
            behind = pen.canvas.color_near(*pen.at(0, up), 0.35 * pen.item.metre)
            colors[i] = 0.93 * behind + 0.07 * colors[i]
    excess = np.array((0.75, rng.uniform(0.65, 0.95), 1.0)) * (weather.body - weather.ground)
    _paint_figure(pen, colors, weather.ground + excess, rng)


def _paint_figure(
    pen: Pen, colors: Sequence[Color], temperatures: Sequence[float], rng: Generator
) -> None:
    """A human shape; colors and temperatures of legs, upper body and skin."""
    tall = rng.uniform(1.6, 1.85)
    stride, swing = tall * rng.uniform(0.01, 0.12), tall * rng.uniform(-0.02, 0.08)
    parts = [pen.part(color, heat) for color, heat in zip(colors, temperatures, strict=True)]
    legs, upper, skin = parts

    def limb(x: float, top: float, end: float, low: float, half: float, part: int) -> None:
        ends = [(x - half, top), (x + half, top), (end + half, low), (end - half, low)]
        pen.polygon(ends, part)

    for side in (-1, 1):
        hip, shoulder = 0.055 * side * tall, 0.14 * side * tall
        limb(hip, 0.5 * tall, hip + side * stride, 0.0, 0.05 * tall, legs)
        limb(shoulder, 0.8 * tall, shoulder + side * swing, 0.46 * tall, 0.032 * tall, upper)
    right = [(0.11, 0.46), (0.155, 0.8), (0.06, 0.85)]
    pen.polygon(np.array(right + [(-x, y) for x, y in right[::-1]]) * tall, upper)
    pen.ellipse(0, 0.915 * tall, 0.065 * tall, 0.085 * tall, skin)


def _draw_poster(pen: Pen, weather: Weather, rng: Generator) -> None:
    """A board that shows a person: the right shape in rgb, nothing in thermal."""
    frame = pen.part((0.3, 0.3, 0.32), weather.ground)
    panel = pen.part(_jitter(rng, (0.7, 0.72, 0.75), 0.2), weather.ground, 0.3 * weather.is_night)
    pen.box(-0.62, 0, 0.62, 2.15, frame)
    pen.box(-0.52, 0.1, 0.52, 2.05, panel)
    colors = [_pick(rng, _CLOTHES), _pick(rng, _CLOTHES), _SKIN]
    pen.item = pen.item._replace(foot=pen.item.foot - 0.18 * pen.item.metre)
    _paint_figure(pen, colors, (weather.ground,) * 3, rng)


def _draw_machine(pen: Pen, weather: Weather, rng: Generator) -> None:
    """A vending machine or heated cabinet, as warm and as tall as a person."""
    heat, half = rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.45)
    shell = _pick(rng, ((0.7, 0.15, 0.15), (0.2, 0.35, 0.65), (0.6, 0.6, 0.62)))
    pen.box(-half, 0, half, 1.8, pen.part(shell, heat))
    if rng.random() < 0.6:
        window = pen.part((0.85, 0.9, 0.9), heat, 0.7 * weather.is_night)
        pen.box(-0.8 * half, 0.85, 0.8 * half, 1.65, window)


def _draw_cone(pen: Pen, weather: Weather, rng: Generator) -> None:
    """Orange with a white band, throwing light back at night; as warm as the road."""
    glow = rng.uniform(0.25, 0.4) * weather.is_night
    body = pen.part(_jitter(rng, (0.95, 0.38, 0.08)), weather.ground, 0.6 * glow)
    band = pen.part((0.95, 0.93, 0.9), weather.ground, glow)
    pen.box(-0.3, 0, 0.3, 0.08, body)
    pen.polygon([(-0.22, 0.06), (0.22, 0.06), (0.05, 0.85), (-0.05, 0.85)], body)
    pen.polygon([(-0.16, 0.3), (0.16, 0.3), (0.12, 0.48), (-0.12, 0.48)], band)


class _CarParts(NamedTuple):
    runs: bool  # a parked car is cold, and dark at night
    paint: int
    engine: int
    tyre: int
    glass: int
    lamp_heat: float


def _car_parts(pen: Pen, weather: Weather, rng: Generator) -> _CarParts:
    runs, color = rng.random() < 0.65, _pick(rng, _PAINTS)
    cold, hot = weather.ground - 0.04, rng.uniform(0.65, 0.9)
    return _CarParts(
        runs=runs,
        paint=pen.part(color, weather.ground + 0.08 if runs else cold),
        engine=pen.part(0.8 * color, hot if runs else cold),
        tyre=pen.part((0.05, 0.05, 0.06), hot - 0.1 if runs else cold),
        glass=pen.part(_GLASS, weather.ground - 0.15),
        lamp_heat=weather.ground + 0.06 if runs else cold,
    )


def _draw_car_end(pen: Pen, weather: Weather, rng: Generator) -> None:
    """A car from the front or from behind."""
    car, is_front = _car_parts(pen, weather, rng), rng.random() < 0.5
    pen.box(-0.8, 0, -0.52, 0.4, car.tyre)
    pen.box(0.52, 0, 0.8, 0.4, car.tyre)
    pen.box(-0.88, 0.2, 0.88, 0.85, car.paint)
    pen.polygon([(-0.85, 0.8), (0.85, 0.8), (0.62, 1.45), (-0.62, 1.45)], car.paint)
    pen.polygon([(-0.72, 0.88), (0.72, 0.88), (0.55, 1.36), (-0.55, 1.36)], car.glass)
    pen.box(-0.5, 0.22, 0.5, 0.62 if is_front else 0.36, car.engine)
    shines = car.runs and weather.is_night
    lamp = pen.part(_WHITE_LIGHT if is_front else (0.8, 0.1, 0.08), car.lamp_heat, float(shines))
    for x in (-0.68, 0.68):
        pen.ellipse(x, 0.68, 0.16, 0.11, lamp)
        if shines:
            radius, color = (1.3, _WHITE_LIGHT) if is_front else (0.7, _RED_LIGHT)
            pen.light(x, 0.68, radius, 0.75, color, lamp)


def _draw_car_side(pen: Pen, weather: Weather, rng: Generator) -> None:
    """A car from the side."""
    pen.sign = 1.0 if rng.random() < 0.5 else -1.0
    car = _car_parts(pen, weather, rng)
    pen.polygon([(-1.95, 0.25), (1.95, 0.25), (1.95, 0.7), (1.1, 0.88), (-1.9, 0.88)], car.paint)
    pen.polygon([(1.95, 0.45), (1.95, 0.72), (1.05, 0.88), (1.05, 0.45)], car.engine)
    pen.polygon([(-1.75, 0.85), (1.15, 0.85), (0.55, 1.45), (-1.3, 1.45)], car.paint)
    pen.polygon([(-1.5, 0.9), (-0.38, 0.9), (-0.38, 1.35), (-1.2, 1.35)], car.glass)
    pen.polygon([(-0.25, 0.9), (0.92, 0.9), (0.48, 1.35), (-0.25, 1.35)], car.glass)
    for x in (-1.2, 1.2):
        pen.ellipse(x, 0.32, 0.32, 0.32, car.tyre)
        pen.ellipse(x, 0.32, 0.15, 0.15, car.engine)
    if car.runs and weather.is_night:
        for x, radius, color in ((1.9, 1.2, _WHITE_LIGHT), (-1.9, 0.6, _RED_LIGHT)):
            lamp = pen.part(color, car.lamp_heat, 1.0)
            pen.box(x - 0.08, 0.58, x + 0.08, 0.76, lamp)
            pen.light(x, 0.67, radius, 0.7, color, lamp)


def _draw_lamp(pen: Pen, weather: Weather, rng: Generator) -> None:
    """A street lamp: warm head, and at night a pool of light on the ground."""
    pen.box(-0.06, 0, 0.06, 4.4, pen.part((0.35, 0.36, 0.37), weather.ground - 0.04))
    head = pen.part((0.9, 0.85, 0.7), rng.uniform(0.6, 0.95), float(weather.is_night))
    pen.ellipse(0, 4.4, 0.28, 0.2, head)
    if weather.is_night:
        pen.light(0, 4.4, 1.6, 0.7, (1.0, 0.85, 0.55), head)
        pen.light(0, 0, 4.5, 0.5, (1.0, 0.85, 0.6), None)


def _draw_sign(pen: Pen, weather: Weather, rng: Generator) -> None:
    pen.box(-0.05, 0, 0.05, 2.5, pen.part((0.45, 0.45, 0.47), weather.ground))
    plate = _pick(rng, ((0.75, 0.12, 0.12), (0.15, 0.3, 0.7)))
    pen.ellipse(0, 2.4, 0.32, 0.32, pen.part(plate, weather.ground - 0.03))


def _draw_tree(pen: Pen, weather: Weather, rng: Generator) -> None:
    trunk = pen.part(_jitter(rng, (0.3, 0.22, 0.16), 0.03), weather.ground + 0.02)
    pen.box(-0.15, 0, 0.15, 2.6, trunk)
    _paint_leaves(pen, (0.0, 3.7), (1.1, 1.0), weather, rng)


def _draw_bush(pen: Pen, weather: Weather, rng: Generator) -> None:
    _paint_leaves(pen, (0.0, 0.4), (0.5, 0.3), weather, rng)


def _paint_leaves(
    pen: Pen,
    middle: tuple[float, float],
    spread: tuple[float, float],
    weather: Weather,
    rng: Generator,
) -> None:
    for x, y in middle + np.asarray(spread) * rng.uniform(-0.8, 0.8, (5, 2)):
        heat = weather.ground - rng.uniform(0.0, 0.05)
        leaves = pen.part(_jitter(rng, (0.2, 0.36, 0.14), 0.06), heat)
        pen.ellipse(x, max(y, 0.7 * spread[1]), 0.75 * spread[0], 0.7 * spread[1], leaves)


class _Kind(NamedTuple):
    draw: Callable[[Pen, Weather, Generator], None]
    label: int
    width: float  # metres
    height: float  # metres
    near: tuple[float, float]  # where it may stand: image heights below the horizon
    side: int  # 1 = the spread is measured from the kerb, 0 = from the middle of the road
    spread: tuple[float, float]  # metres


_KINDS = {
    "person": _Kind(_draw_person, PERSON, 0.6, 1.7, (0.18, 0.42), 0, (0.0, 4.2)),
    "cone": _Kind(_draw_cone, CONE, 0.6, 0.85, (0.19, 0.5), 0, (0.0, 2.2)),
    "car_end": _Kind(_draw_car_end, CAR, 1.8, 1.45, (0.17, 0.34), 0, (0.0, 2.2)),
    "car_side": _Kind(_draw_car_side, CAR, 3.9, 1.45, (0.16, 0.26), 0, (0.0, 4.2)),
    "poster": _Kind(_draw_poster, BACKGROUND, 1.2, 2.1, (0.15, 0.3), 1, (0.7, 1.8)),
    "machine": _Kind(_draw_machine, BACKGROUND, 0.8, 1.8, (0.16, 0.34), 1, (0.7, 1.8)),
    "bush": _Kind(_draw_bush, BACKGROUND, 1.6, 0.9, (0.2, 0.5), 1, (0.7, 1.8)),
    "sign": _Kind(_draw_sign, BACKGROUND, 0.2, 2.8, (0.25, 0.5), 1, (0.7, 1.8)),
    "lamp": _Kind(_draw_lamp, BACKGROUND, 0.2, 4.5, (0.1, 0.25), 1, (0.7, 1.8)),
    "tree": _Kind(_draw_tree, BACKGROUND, 0.5, 4.0, (0.1, 0.22), 1, (0.7, 1.8)),
}


def _render_rgb(
    canvas: Canvas, looks: np.ndarray, street: Street, weather: Weather, rng: Generator
) -> np.ndarray:
    """Light, shadow, fog, glare and noise of the rgb camera: (H, W, 3) uint8."""
    size = canvas.parts.shape
    on_ground = looks[..., 5:] == 0
    light = weather.ambient * (1 + _drift(rng, size, 0.1))[..., None]
    light = np.where(on_ground & (canvas.shade > 0)[..., None], 0.55 * light, light)
    if weather.is_night:
        light = light * np.array((0.8, 0.95, 1.1), np.float32)
        radii = (0.55 * street.height, 0.24 * street.height)
        light += _spot(size, street.point(0, 0.38), radii, (0.6, 0.6, 0.55))  # own headlights
        for lamp in canvas.lights:
            if lamp.part is None:
                radii = (lamp.radius, 0.35 * lamp.radius)
                light += lamp.strength * _spot(size, lamp[:2], radii, lamp.color)
    rgb = looks[..., :3] * np.maximum(light, looks[..., 4:5])
    if weather.fog:
        below = np.maximum(np.arange(size[0]) / size[0] - street.horizon, 0.03)
        distance = np.where(on_ground, (_FOCAL_M / below)[:, None, None], looks[..., 5:])
        clear = np.exp(-weather.fog * distance.astype(np.float32))
        rgb = rgb * clear + (0.17 if weather.is_night else 0.78) * (1 - clear)
    for lamp in canvas.lights:
        if lamp.part is not None and _is_seen(canvas, lamp):
            rgb += lamp.strength * _spot(size, lamp[:2], (lamp.radius,) * 2, lamp.color)
    if weather.glare:
        center = rng.uniform((0.1, 0.25), (0.9, 0.7)) * size[::-1]
        radius = rng.uniform(0.07, 0.13) * street.height
        for wider, share in ((1.0, 1.0), (2.6, 0.35)):
            radii = (wider * radius,) * 2
            rgb += share * weather.glare * _spot(size, center, radii, (1.0, 0.96, 0.88))
    rgb += (0.022 if weather.is_night else 0.012) * rng.standard_normal(rgb.shape, np.float32)
    return _to_uint8(rgb)


def _render_thermal(temperature: np.ndarray, rng: Generator) -> np.ndarray:
    """Drift, blur, column pattern and noise of the thermal camera: (H, W) uint8."""
    height, width = temperature.shape
    heat = temperature + _drift(rng, temperature.shape, 0.02)
    heat = cv2.GaussianBlur(heat, (0, 0), 0.006 * height)
    heat += 0.006 * rng.standard_normal((1, width), np.float32)
    heat += 0.012 * rng.standard_normal((height, width), np.float32)
    return _to_uint8(heat)


def _drift(rng: Generator, size: tuple[int, int], strength: float) -> np.ndarray:
    """(H, W) slow random change around 0."""
    coarse = strength * rng.standard_normal((5, 7), np.float32)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def _spot(
    size: tuple[int, int], center: Sequence[float], radii: Sequence[float], color: Color
) -> np.ndarray:
    """(H, W, 3) Gaussian spot of light."""
    column, row = (np.arange(length, dtype=np.float32) for length in size[::-1])
    across = np.exp(-0.5 * ((column - center[0]) / radii[0]) ** 2)
    down = np.exp(-0.5 * ((row - center[1]) / radii[1]) ** 2)
    return np.outer(down, across)[..., None] * np.asarray(color, np.float32)


def _is_seen(canvas: Canvas, lamp: Light) -> bool:
    row, column = round(lamp.y), round(lamp.x)
    height, width = canvas.parts.shape
    return 0 <= row < height and 0 <= column < width and canvas.parts[row, column] == lamp.part


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def write_dataset(
    folder: Path,
    *,
    counts: Mapping[str, int],
    height: int,
    width: int,
    seed: int,
    on_scene: Callable[[], object] | None = None,
) -> bool:
    """Draw a data set in the standard layout: folder/{RGB,Modal,Label}/00000D.png and lists.

    The folder appears whole or not at all. test_day.txt and test_night.txt divide test.txt.

    Args:
        counts: scenes per split, of train, val and test; a split of 0 gets no list.
        on_scene: called after each scene, for a progress bar.
    Returns:
        False where exactly this data set was there already, and nothing was done.
    Raises:
        InputError: counts without any scene or of an unknown split, too small a size, a folder
            that holds anything else or that cannot be made.
    """
    unknown = sorted(set(counts) - set(SPLITS))
    if unknown or min(counts.values(), default=0) < 0 or not sum(counts.values()):
        raise InputError(
            f"counts must give 0 or more scenes of {', '.join(SPLITS)}, and one at least; "
            f"got {dict(counts)}"
        )
    lists = _split_lists(counts)
    description = {
        "version": _VERSION,
        "counts": {split: counts.get(split, 0) for split in SPLITS},
        "height": height,
        "width": width,
        "seed": seed,
    }
    folder = folder.resolve()
    if _is_drawn(folder, description, lists):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise InputError(f"cannot write into {folder.parent}: {error.strerror}") from error
    with aside as path:
        drawn = Path(path) / folder.name
        drawn.mkdir()
        for index, stem in enumerate(_all_stems(lists)):
            scene = draw_scene(index, height=height, width=width, seed=seed)
            for name, image in zip(_FOLDERS, scene, strict=True):
                write_png(drawn / name / f"{stem}.png", image)
            if on_scene is not None:
                on_scene()
        for name, stems in lists.items():
            (drawn / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        (drawn / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        try:
            drawn.replace(folder)  # works onto nothing and onto an empty folder
        except OSError as error:
            if _is_drawn(folder, description, lists):  # another process was faster
                return False
            raise InputError(f"cannot put the scenes at {folder}: {error.strerror}") from error
    return True


def _split_lists(counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Stems by list name; they end with D (day) or N (night), as MFNet's do."""
    lists, start = {}, 0
    for split in SPLITS:
        indices = range(start, start + counts.get(split, 0))
        lists[split] = [f"{index:05d}{'N' if is_night(index) else 'D'}" for index in indices]
        start = indices.stop
    lists["test_day"] = [stem for stem in lists["test"] if stem.endswith("D")]
    lists["test_night"] = [stem for stem in lists["test"] if stem.endswith("N")]
    return {name: stems for name, stems in lists.items() if stems}


def _all_stems(lists: Mapping[str, list[str]]) -> list[str]:
    return [stem for split in SPLITS for stem in lists.get(split, [])]


def _is_drawn(folder: Path, description: dict[str, object], lists: Mapping[str, list[str]]) -> bool:
    """Whether folder holds exactly these scenes; False if it is absent or empty."""
    if folder.is_dir() and not any(folder.iterdir()) or not folder.exists():
        return False
    advice = "choose another folder, or remove this one to have it drawn again"
    try:
        found = json.loads((folder / _DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} exists and holds no drawn scenes; {advice}") from error
    if found != description:
        raise InputError(
            f"{folder} holds other scenes, {json.dumps(found)}, than asked for, "
            f"{json.dumps(description)}; {advice}"
        )
    files = [folder / f"{name}.txt" for name in lists]
    files += [folder / name / f"{stem}.png" for stem in _all_stems(lists) for name in _FOLDERS]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{len(missing)} files are missing, the first {missing[0]}; {advice}")
    return True
