"""The fusion metrics against the plain Python way of the field.

    python benchmarks/metrics.py                    # 2 threads, the sizes of the results file
    python benchmarks/metrics.py --device cuda

All metrics of each protocol on 480x640 images, RGB sources and RGB fused, milliseconds an image,
best of the repeats (other work on the machine only ever adds time), all taking turns. Images lie on
the device; a run ends when it has finished. "plain" has the cddfuse metrics one image at a time
with NumPy, SciPy, scikit-image and scikit-learn on the CPU, written down formula by formula, as
published evaluators do it; its values are compared with ours, and a GPU's with the CPU's.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.signal import convolve2d
from skimage.metrics import structural_similarity
from sklearn.metrics import mutual_info_score
from torch import Tensor

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.environment import environment_info
from utils.fusion_metrics import PROTOCOLS, fusion_metrics

HEIGHT, WIDTH = 480, 640


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"machine: {environment_info()}, {arguments.threads} CPU threads\n")

    images = make_images(max(arguments.batches))
    grey = [opencv_grey(image[0]) for image in images]
    images = [image.to(device) for image in images]
    runs = {("plain cddfuse", 1): lambda: plain_metrics(*grey)}
    for protocol in PROTOCOLS:
        for batch in arguments.batches:
            runs[protocol, batch] = scored([x[:batch] for x in images], protocol, device)
    best = dict.fromkeys(runs, math.inf)
    for _ in range(1 + arguments.repeats):  # the first round warms up; it can only be slower
        for (name, batch), run in runs.items():
            start = time.perf_counter()
            run()
            ms = 1e3 * (time.perf_counter() - start) / batch
            best[name, batch] = min(best[name, batch], ms)
    print("| metrics | device | batch | ms an image | times as fast as plain |")
    print("|---|---|---|---|---|")
    for (name, batch), ms in best.items():
        where = "CPU" if name.startswith("plain") else name_of(device)
        print(f"| {name} | {where} | {batch} | {ms:.2f} | {best['plain cddfuse', 1] / ms:.1f} |")
    compare(grey, [image[:1] for image in images])


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def scored(images: list[Tensor], protocol: str, device: torch.device) -> Callable[[], None]:
    """A run that ends when the scores are there."""

    def run() -> None:
        fusion_metrics(*images, protocol=protocol)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def compare(grey: list[np.ndarray], images: list[Tensor]) -> None:
    """Print how far the ways are apart; they must measure the same."""
    plain = plain_metrics(*grey)
    print()
    for protocol in PROTOCOLS:
        ours = fusion_metrics(*images, protocol=protocol)
        if protocol == "cddfuse":
            print_largest_difference("plain", protocol, plain, ours)
        if images[0].device.type != "cpu":
            on_cpu = fusion_metrics(*(image.cpu() for image in images), protocol=protocol)
            print_largest_difference("the CPU", protocol, on_cpu, ours)


def print_largest_difference(
    other: str, protocol: str, expected: Mapping[str, float], found: Mapping[str, float]
) -> None:
    apart = {name: abs(float(found[name]) / float(value) - 1) for name, value in expected.items()}
    worst = max(apart, key=apart.get)
    print(f"{protocol}: largest relative difference from {other}: {apart[worst]:.1e} ({worst})")


def make_images(count: int) -> list[Tensor]:
    """rgb, thermal and fused, uint8 (count, 3 or 1, H, W): blurred noise on several scales."""
    generator = np.random.default_rng(0)

    def picture() -> np.ndarray:
        layers = [
            cv2.GaussianBlur(generator.standard_normal((HEIGHT, WIDTH)), (0, 0), sigma) * sigma
            for sigma in (1, 4, 16)
        ]
        total = sum(layers)
        return 255 * (total - total.min()) / (total.max() - total.min())

    sources = [[picture() for _ in range(4)] for _ in range(count)]
    rgb = np.stack([channels[:3] for channels in sources])
    thermal = np.stack([channels[3:] for channels in sources])
    fused = (rgb + thermal) / 2
    return [torch.from_numpy(x.round().astype(np.uint8)) for x in (rgb, thermal, fused)]


def opencv_grey(image: Tensor) -> np.ndarray:
    """(3 or 1, H, W) -> (H, W) float32, rounded luma."""
    array = image.permute(1, 2, 0).contiguous().numpy()
    grey = array[..., 0] if array.shape[2] == 1 else cv2.cvtColor(array, cv2.COLOR_RGB2GRAY)
    return grey.astype(np.float32)


def plain_metrics(rgb: np.ndarray, thermal: np.ndarray, fused: np.ndarray) -> dict[str, float]:
    """The cddfuse metrics of one image."""
    sources = (thermal, rgb)
    counts = np.bincount(fused.astype(int).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    rows, columns = np.diff(fused, axis=0), np.diff(fused, axis=1)
    slope_y, slope_x = np.gradient(fused)
    error = float(np.mean([np.mean((source - fused) ** 2) for source in sources]))
    return {
        "EN": -(shares * np.log2(shares)).sum(),
        "SD": fused.std(),
        "SF": math.sqrt((rows**2).mean() + (columns**2).mean()),
        "AG": np.sqrt((slope_x**2 + slope_y**2) / 2).mean(),
        "MI": sum(mutual_info_score(fused.ravel(), source.ravel()) for source in sources),
        "MSE": error,
        "PSNR": 10 * math.log10(fused.max() ** 2 / error),
        "CC": np.mean([plain_correlation(source, fused) for source in sources]),
        "SCD": plain_correlation(fused - rgb, thermal) + plain_correlation(fused - thermal, rgb),
        "VIF": sum(plain_vif(source, fused) for source in sources),
        "Qabf": plain_qabf(sources, fused),
        "SSIM": sum(structural_similarity(fused, source, data_range=2) for source in sources),
    }


def plain_correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / math.sqrt((first**2).sum() * (second**2).sum())


def plain_vif(source: np.ndarray, fused: np.ndarray) -> float:
    source, fused = source.astype(np.float64), fused.astype(np.float64)
    kept = available = 0.0
    for scale in range(4):
        side = 2 ** (4 - scale) + 1
        offset = np.arange(side) - side // 2
        bell = np.exp(-(offset**2) / (2 * (side / 5) ** 2))
        window = np.outer(bell, bell) / bell.sum() ** 2

        def filtered(image: np.ndarray, window: np.ndarray = window) -> np.ndarray:
            return convolve2d(image, window, mode="valid")

        if scale > 0:
            source, fused = filtered(source)[::2, ::2], filtered(fused)[::2, ::2]
        mean_s, mean_f = filtered(source), filtered(fused)
        variance_s = np.maximum(filtered(source**2) - mean_s**2, 0)
        variance_f = np.maximum(filtered(fused**2) - mean_f**2, 0)
        covariance = filtered(source * fused) - mean_s * mean_f
        gain = covariance / (variance_s + 1e-10)
        gain[(variance_s < 1e-10) | (variance_f < 1e-10)] = 0
        residual = np.maximum(np.where(gain < 0, variance_f, variance_f - gain * covariance), 1e-10)
        gain = np.maximum(gain, 0)
        kept += np.log10(1 + gain**2 * variance_s / (residual + 2)).sum()
        available += np.log10(1 + variance_s / 2).sum()
    return kept / available


def plain_qabf(sources: tuple[np.ndarray, ...], fused: np.ndarray) -> float:
    across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=np.float32)

    def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slope_x = convolve2d(image, across, mode="same")
        slope_y = convolve2d(image, across.T[::-1], mode="same")
        angle = np.full_like(slope_x, math.pi / 2)
        sloped = slope_x != 0
        angle[sloped] = np.arctan(slope_y[sloped] / slope_x[sloped])
        return np.sqrt(slope_x**2 + slope_y**2), angle

    strength_f, angle_f = edges(fused)
    kept = available = 0.0
    for source in sources:
        strength, angle = edges(source)
        stronger = np.maximum(strength, strength_f)
        ratio = np.minimum(strength, strength_f) / np.where(stronger == 0, 1, stronger)
        ratio = np.where(strength == strength_f, strength_f, ratio)
        turn = 1 - np.abs(angle - angle_f) / (math.pi / 2)
        by_strength = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5)))
        by_angle = 0.9879 / (1 + np.exp(-22 * (turn - 0.8)))
        kept += (by_strength * by_angle * strength).sum()
        available += strength.sum()
    return kept / available


if __name__ == "__main__":
    main()
