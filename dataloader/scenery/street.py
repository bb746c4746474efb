"""The street of a drawn scene in perspective, and the weather that all its things share."""

from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from dataloader.scenery.canvas import CIRCLE, KERB, Canvas, Points, jitter, pick

EYE_M = 1.6  # height of the camera above the road
FOCAL_M = 2.1  # distance of ground that is one image height below the horizon
_FAR_M = 45.0  # distance of sky and skyline
_WALLS = ((0.55, 0.42, 0.35), (0.62, 0.6, 0.55), (0.45, 0.46, 0.5), (0.5, 0.32, 0.26))
_PAVINGS = ((0.5, 0.47, 0.44), (0.42, 0.42, 0.42), (0.25, 0.4, 0.18))


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
        side = across * near / EYE_M + self.bend * max(1 - near / 0.6, 0.0) ** 2
        row = self.horizon + near * (1 - up / EYE_M)
        return self.vanishing * self.width + side * self.height, row * self.height

    def across(self, column: float, near: float) -> float:
        """Metres across of a column, a fraction of the width, where the road is straight."""
        return EYE_M / near * (column - self.vanishing) * self.width / self.height


def choose_weather(rng: Generator, night: bool) -> Weather:
    """Day or night as asked; fog, heat and glare as they come."""
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


def paint_sky(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
    """Cold sky, and a skyline of far houses and trees."""
    right, end = street.width, (street.horizon + 0.02) * street.height
    day, night = ((0.4, 0.6, 0.88), (0.8, 0.86, 0.9)), ((0.1, 0.12, 0.2), (0.3, 0.25, 0.25))
    top, low = np.array(night if weather.is_night else day)
    for band in np.linspace(0, 1, 12, endpoint=False):
        part = canvas.add_part(top + (low - top) * band, 0.03 + 0.07 * band, distance=_FAR_M)
        canvas.polygon([(0, band * end), (right, band * end), (right, end), (0, end)], part)
    for _ in range(rng.integers(4, 8)):
        color = jitter(rng, np.full(3, rng.uniform(0.25, 0.55)))
        heat = 0.6 * weather.ground + rng.uniform(0, 0.1)
        part = canvas.add_part(color, heat, distance=_FAR_M)
        middle = (rng.uniform(0, right), end)
        size = rng.uniform((0.04, 0.07), (0.1, 0.16)) * street.height
        square = np.array([(-1, 0), (-1, -1), (1, -1), (1, 0)])
        canvas.polygon((square if rng.random() < 0.5 else CIRCLE) * size + middle, part)


def paint_ground(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
    """Road, pavement or grass and road marks of one temperature; warm manholes."""
    right, bottom, top = street.width, street.height, (street.horizon + 0.01) * street.height
    beside = canvas.add_part(pick(rng, _PAVINGS), weather.ground)
    canvas.polygon([(0, top), (right, top), (right, bottom), (0, bottom)], beside)
    road = canvas.add_part(np.full(3, rng.uniform(0.24, 0.38)), weather.ground)
    steps, half = np.geomspace(0.02, 0.75, 10), street.half_road
    left_edge = [street.point(-half, near) for near in steps]
    canvas.polygon(left_edge + [street.point(half, near) for near in steps[::-1]], road)
    mark = canvas.add_part(jitter(rng, (0.75, 0.75, 0.72)), weather.ground)
    middle, phase = rng.uniform(-0.5, 0.5), rng.uniform(0, 3)
    for start in (3.0, 7.0, 11.0, 15.0):  # metres
        near, far = FOCAL_M / (start + phase), FOCAL_M / (start + phase + 2)
        corners = ((-0.08, near), (0.08, near), (0.08, far), (-0.08, far))
        canvas.polygon([street.point(middle + x, at) for x, at in corners], mark)
    for _ in range(rng.integers(0, 3)):
        cover = canvas.add_part((0.16, 0.15, 0.15), rng.uniform(0.6, 0.95))
        near = rng.uniform(0.2, 0.5)
        radii = np.array((0.35, 0.1)) * near * street.height / EYE_M
        canvas.polygon(CIRCLE * radii + street.point(rng.uniform(-0.8, 0.8) * half, near), cover)


def paint_kerbs(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
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


def paint_houses(canvas: Canvas, street: Street, weather: Weather, rng: Generator) -> None:
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
        return [street.point(across, FOCAL_M / at, up) for at, up in corners]

    heat = weather.ground + rng.uniform(-0.06, 0.08)
    wall = canvas.add_part(pick(rng, _WALLS), heat, distance=distance)
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
