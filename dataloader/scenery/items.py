"""The things that stand in a drawn street: people, cars, cones and what only looks like them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from dataloader.scenery.canvas import (
    BACKGROUND,
    CAR,
    CIRCLE,
    CONE,
    PERSON,
    Canvas,
    Color,
    Light,
    Points,
    fill,
    jitter,
    pick,
)
from dataloader.scenery.street import EYE_M, FOCAL_M, Street, Weather

_PAINTS = (
    (0.85, 0.85, 0.86), (0.08, 0.08, 0.09), (0.62, 0.1, 0.1), (0.1, 0.16, 0.45), (0.5, 0.52, 0.55),
    (0.75, 0.68, 0.3), (0.1, 0.35, 0.25),
)  # fmt: skip
_CLOTHES = (
    (0.75, 0.12, 0.14), (0.12, 0.22, 0.6), (0.1, 0.1, 0.12), (0.85, 0.83, 0.8), (0.15, 0.4, 0.2),
    (0.8, 0.65, 0.2), (0.4, 0.2, 0.45), (0.3, 0.26, 0.22), (0.2, 0.5, 0.6), (0.75, 0.42, 0.2),
)  # fmt: skip
_SKIN, _GLASS = (0.75, 0.56, 0.45), (0.16, 0.2, 0.25)
_RED_LIGHT, _WHITE_LIGHT = (1.0, 0.12, 0.08), (1.0, 0.93, 0.75)


class Item(NamedTuple):
    """Something that stands on the ground."""

    kind: str  # a key of _KINDS
    x: float  # column of its middle; pixels
    foot: float  # row at which it stands; pixels
    metre: float  # pixels per metre there


class Pen:
    """Paints one item in metres: x to the right (or left) of its middle, y above its foot."""

    def __init__(self, canvas: Canvas, item: Item) -> None:
        self.canvas, self.item = canvas, item
        self.sign = 1.0  # -1.0 mirrors what is painted next

    def part(self, color: Color, temperature: float, glow: float = 0.0) -> int:
        distance = FOCAL_M * self.canvas.parts.shape[0] / (EYE_M * self.item.metre)
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
        self.polygon(CIRCLE * (radius_x, radius_y) + (x, y), part)

    def light(
        self, x: float, y: float, radius: float, strength: float, color: Color, part: int | None
    ) -> None:
        radius *= self.item.metre
        self.canvas.lights.append(Light(*self.at(x, y), radius, strength, color, part))


def _draw_person(pen: Pen, weather: Weather, rng: Generator) -> None:
    """Warm; at night dressed nearly in the colors of what is behind."""
    colors = [pick(rng, _CLOTHES), pick(rng, _CLOTHES), jitter(rng, _SKIN)]
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
    panel = pen.part(jitter(rng, (0.7, 0.72, 0.75), 0.2), weather.ground, 0.3 * weather.is_night)
    pen.box(-0.62, 0, 0.62, 2.15, frame)
    pen.box(-0.52, 0.1, 0.52, 2.05, panel)
    colors = [pick(rng, _CLOTHES), pick(rng, _CLOTHES), _SKIN]
    pen.item = pen.item._replace(foot=pen.item.foot - 0.18 * pen.item.metre)
    _paint_figure(pen, colors, (weather.ground,) * 3, rng)


def _draw_machine(pen: Pen, weather: Weather, rng: Generator) -> None:
    """A vending machine or heated cabinet, as warm and as tall as a person."""
    heat, half = rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.45)
    shell = pick(rng, ((0.7, 0.15, 0.15), (0.2, 0.35, 0.65), (0.6, 0.6, 0.62)))
    pen.box(-half, 0, half, 1.8, pen.part(shell, heat))
    if rng.random() < 0.6:
        window = pen.part((0.85, 0.9, 0.9), heat, 0.7 * weather.is_night)
        pen.box(-0.8 * half, 0.85, 0.8 * half, 1.65, window)


def _draw_cone(pen: Pen, weather: Weather, rng: Generator) -> None:
    """Orange with a white band, throwing light back at night; as warm as the road."""
    glow = rng.uniform(0.25, 0.4) * weather.is_night
    body = pen.part(jitter(rng, (0.95, 0.38, 0.08)), weather.ground, 0.6 * glow)
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
    runs, color = rng.random() < 0.65, pick(rng, _PAINTS)
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
    plate = pick(rng, ((0.75, 0.12, 0.12), (0.15, 0.3, 0.7)))
    pen.ellipse(0, 2.4, 0.32, 0.32, pen.part(plate, weather.ground - 0.03))


def _draw_tree(pen: Pen, weather: Weather, rng: Generator) -> None:
    trunk = pen.part(jitter(rng, (0.3, 0.22, 0.16), 0.03), weather.ground + 0.02)
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
        leaves = pen.part(jitter(rng, (0.2, 0.36, 0.14), 0.06), heat)
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


def place_items(street: Street, rng: Generator) -> list[Item]:
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
            item = Item(name, *street.point(across, near), near * street.height / EYE_M)
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


def draw_items(canvas: Canvas, items: Sequence[Item], weather: Weather, rng: Generator) -> None:
    """Paint items from the farthest to the nearest, whatever their order."""
    if not weather.is_night:
        for item in items:
            _paint_shadow(canvas, item, weather)
    for item in sorted(items, key=lambda item: item.foot):
        _KINDS[item.kind].draw(Pen(canvas, item), weather, rng)


def _paint_shadow(canvas: Canvas, item: Item, weather: Weather) -> None:
    left, right, top, foot = _box(item)
    half, tall = (right - left) / 2, foot - top
    fill(canvas.shade, CIRCLE * (half, 0.12 * item.metre) + (item.x, foot), 1)
    tip = (item.x + weather.sun * tall, foot + 0.2 * tall)
    ends = [(tip[0] + 0.7 * half, tip[1]), (tip[0] - 0.7 * half, tip[1])]
    fill(canvas.shade, [(left, foot), (right, foot), *ends], 1)
