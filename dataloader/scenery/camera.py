"""From painted parts to pictures: the rgb and the thermal camera of a drawn scene."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.random import Generator

from dataloader.scenery.canvas import Canvas, Color, Light
from dataloader.scenery.street import FOCAL_M, Street, Weather


def render_rgb(
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
        distance = np.where(on_ground, (FOCAL_M / below)[:, None, None], looks[..., 5:])
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


def render_thermal(temperature: np.ndarray, rng: Generator) -> np.ndarray:
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
