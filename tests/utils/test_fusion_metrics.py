"""Fusion metrics against the original programs, other libraries and their own properties."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch._subclasses.fake_tensor import FakeTensorMode

from utils import fusion_measures
from utils.fusion_measures import gaussian_window, smooth
from utils.fusion_metrics import METRICS, PIXELS_AT_ONCE, PROTOCOLS, fusion_metrics

NAMES = {"EN", "SD", "SF", "AG", "MI", "CC", "SCD", "PSNR", "MSE", "VIF", "Qabf", "SSIM"}
# The cddfuse program computes in float32, its SSIM of small variances too; here edges and AG do.
TOLERANCE = {"tang": 1e-7, "cddfuse": 1e-5}
# Metrics that do not change when the sources change places.
SYMMETRIC = {"MI", "CC", "SCD", "PSNR", "MSE", "VIF", "Qabf", "SSIM", "MS-SSIM"}


def image(seed, channels=1, hw=(176, 180)):
    """(1, C, H, W) uint8: blurred noise, so that it has edges and flat parts."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (*hw, channels)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3).reshape(*hw, channels)
    spread = (smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255
    return torch.from_numpy(spread.round().astype(np.uint8)).permute(2, 0, 1)[None]


def constant(value, hw=(176, 180)):
    return torch.full((1, 1, *hw), value, dtype=torch.uint8)


def triples(shared_parity):
    folder = shared_parity / "fusion_metrics"

    def grey(name):
        picture = cv2.imread(str(folder / "images" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        return torch.from_numpy(picture)[None, None]

    for row in json.loads((folder / "values.json").read_text()):
        pair = row["pair"]
        sources = grey(f"{pair}_rgb"), grey(f"{pair}_thermal")
        yield row, (*sources, grey(f"{pair}_fused_{row['fused']}"))


@pytest.mark.parametrize("protocol", ["tang", "cddfuse"])
def test_values_of_the_original_programs(shared_parity, protocol):
    seen = 0
    for row, images in triples(shared_parity):
        found = fusion_metrics(*images, protocol=protocol)
        assert found.keys() == row[protocol].keys()
        for name, expected in row[protocol].items():
            goal = pytest.approx(expected, rel=TOLERANCE[protocol])
            assert found[name].item() == goal, (row["pair"], name)
        seen += 1
    assert seen > 0


def test_strict_has_what_the_programs_miss(shared_parity):
    for row, images in triples(shared_parity):
        found = fusion_metrics(*images, protocol="strict")
        assert found["SSIM"].item() == pytest.approx(row["ssim_range_255"], rel=1e-9)
        expected = row["nabf_intended_order"]
        assert found["Nabf"].item() == pytest.approx(expected, rel=1e-7)
        assert found["VIF"].item() == pytest.approx(row["cddfuse"]["VIF"] / 2, rel=1e-6)
        assert found["MI"].item() == pytest.approx(row["cddfuse"]["MI"] / math.log(2), rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names(protocol):
    extra = {"cddfuse": set(), "tang": {"Nabf", "MS-SSIM"}, "strict": {"Nabf", "MS-SSIM"}}
    found = fusion_metrics(image(0, 3), image(1), image(2, 3), protocol=protocol)
    assert found.keys() == NAMES | extra[protocol]
    assert list(found) == [name for name in METRICS if name in found]
    assert all(value.shape == (1,) and value.dtype == torch.float64 for value in found.values())
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("at_once", [1, 2, 16])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batch_equals_singles(protocol, at_once, monkeypatch):
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", at_once * 176 * 180)
    rgb, thermal, fused = (
        torch.cat([image(seed + 10 * k, channels) for seed in range(3)])
        for k, channels in enumerate((3, 1, 3))
    )
    together = fusion_metrics(rgb, thermal, fused, protocol=protocol)
    for index in range(3):
        one = slice(index, index + 1)
        single = fusion_metrics(rgb[one], thermal[one], fused[one], protocol=protocol)
        for name, value in single.items():
            assert together[name][index].item() == pytest.approx(value.item(), rel=1e-12), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sources_may_change_places(protocol):
    a, b, f = image(0), image(1), image(2)
    one, other = (fusion_metrics(*pair, f, protocol=protocol) for pair in ((a, b), (b, a)))
    # Nabf of tang takes its arguments in another order
    for name in (SYMMETRIC | ({"Nabf"} if protocol == "strict" else set())) & one.keys():
        assert one[name].item() == pytest.approx(other[name].item(), rel=1e-9), name


def test_a_perfect_fusion_of_equal_images():
    x = image(0)
    found = fusion_metrics(x, x, x, protocol="strict")
    for name in ("CC", "VIF", "SSIM", "MS-SSIM"):
        assert found[name].item() == pytest.approx(1, abs=1e-9), name
    assert found["MSE"].item() == 0
    assert found["Nabf"].item() == 0
    assert 0.97 < found["Qabf"].item() < 1  # its sigmoids end there
    assert found["PSNR"].item() > 140
    assert found["MI"].item() == pytest.approx(2 * found["EN"].item())


def test_an_equal_edge_counts_as_kept_in_strict_alone():
    """The slip of the programs: where strengths are equal, the strength itself is the ratio."""
    x = image(0)
    strict, tang = (fusion_metrics(x, x, x, protocol=p)["Qabf"].item() for p in ("strict", "tang"))
    whole = 0.9994 / (1 + math.exp(-15 * 0.5)) * 0.9879 / (1 + math.exp(-22 * 0.2))
    assert strict == pytest.approx(whole)
    assert tang > whole  # as if such edges were far stronger than their source


def test_more_noise_scores_lower():
    a, b = image(0), image(1)
    mean = ((a.int() + b.int()) // 2).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-30, 31, mean.shape, generator=generator)
    noisy = (mean.int() + noise).clamp(0, 255).to(torch.uint8)
    clean, worse = (fusion_metrics(a, b, f, protocol="strict") for f in (mean, noisy))
    for name in ("CC", "VIF", "Qabf", "SSIM", "MS-SSIM", "PSNR"):
        assert clean[name].item() > worse[name].item(), name
    assert clean["Nabf"].item() < worse["Nabf"].item()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_images_have_finite_scores(protocol, value):
    flat, a, b = constant(value), image(0), image(1)
    for images in ((flat, flat, flat), (a, b, flat), (flat, flat, a), (flat, a, a), (a, flat, b)):
        found = fusion_metrics(*images, protocol=protocol)
        assert all(score.isfinite().all() for score in found.values()), found
        if images[2] is flat:
            assert found["EN"].item() == found["SD"].item() == found["CC"].item() == 0
            assert f"{found['EN'].item():.4f}" == "0.0000"  # no -0
    for images in ((flat, a, a), (a, flat, a)):  # half of its sources tell nothing of it
        found = fusion_metrics(*images, protocol=protocol)
        assert found["CC"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("hw", [(6, 9), (32, 45), (41, 41), (176, 177)], ids=str)
def test_small_and_odd_images(protocol, hw):
    found = fusion_metrics(*(image(seed, 1, hw) for seed in range(3)), protocol=protocol)
    undefined = {name for name, score in found.items() if not score.isfinite().all()}
    smallest = {"VIF": 41, "MS-SSIM": 41 if protocol == "tang" else 176}
    if protocol == "cddfuse":
        smallest["SSIM"] = 7
    assert undefined == {n for n, side in smallest.items() if min(hw) < side and n in found}


def test_grey_is_opencv_s():
    rgb, thermal, fused = image(0, 3), image(1), image(2, 3)
    grey = [
        torch.from_numpy(cv2.cvtColor(x[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY))[
            None, None
        ]
        for x in (rgb, fused)
    ]
    found = fusion_metrics(rgb, thermal, fused)
    for name, value in fusion_metrics(grey[0], thermal, grey[1]).items():
        assert found[name].item() == value.item(), name


def test_levels_of_colours_are_those_of_opencv_in_strict_too():
    rgb, thermal, fused = image(0, 3), image(1), image(2, 3)
    rgb[:, :, ::2, ::3] = torch.tensor([0, 1, 201], dtype=torch.uint8)[:, None, None]  # 23
    fused[:, :, ::3, ::2] = rgb[:, :, :1, :1]
    found = fusion_metrics(rgb, thermal, fused, protocol="strict")
    expected = fusion_metrics(rgb, thermal, fused)
    assert found["EN"].item() == expected["EN"].item()
    assert found["MI"].item() == pytest.approx(expected["MI"].item() / math.log(2), rel=1e-12)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_grey_in_three_channels_is_grey(protocol):
    """Also where a formula asks whether gradients are equal, or zero."""
    images = [image(seed) // 16 * 16 for seed in range(3)]
    expected = fusion_metrics(*images, protocol=protocol)
    found = fusion_metrics(*(x.expand(-1, 3, -1, -1) for x in images), protocol=protocol)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name


def as_array(x):
    return x[0, 0].numpy().astype(np.float64)


def test_cddfuse_ssim_is_scikit_image_s():
    a, b, f = image(0), image(1), image(2)
    expected = sum(structural_similarity(as_array(x), as_array(f), data_range=2) for x in (a, b))
    assert fusion_metrics(a, b, f)["SSIM"].item() == pytest.approx(expected)


@pytest.mark.parametrize(("protocol", "data_range"), [("tang", 1), ("strict", 255)])
def test_gaussian_ssim_is_that_of_opencv_s_blur(protocol, data_range):
    """The window of scikit-image, but with the pixels of the border repeated."""

    def blur(x):
        return cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REPLICATE)

    def similarity(x, y):
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        covariance = blur(x * y) - mean_x * mean_y
        return (luminance * (2 * covariance + c2) / (variances + c2)).mean()

    a, b, f = image(0), image(1), image(2)
    expected = np.mean([similarity(as_array(x), as_array(f)) for x in (a, b)])
    found = fusion_metrics(a, b, f, protocol=protocol)["SSIM"].item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("hw", [(17, 17), (18, 41), (33, 24)], ids=str)
def test_smooth_is_a_convolution(hw, step):
    x = torch.randn(2, 3, *hw, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = gaussian_window(17, 3.4)
    weights = torch.tensor(window, dtype=torch.float64)
    kernel = weights[:, None] * weights
    expected = torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], kernel[None, None], stride=step)
    torch.testing.assert_close(smooth(x, window, step), expected[:, 0].unflatten(0, (2, 3)))
    on_gpu = fusion_measures._depthwise(x.flatten(0, 1), window, step)
    torch.testing.assert_close(on_gpu, expected[:, 0])


@pytest.mark.skipif(
    torch.__version__.startswith("2.4"),
    reason="PyTorch 2.4 makes no stand-ins of CUDA tensors here",
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_step_waits_for_a_gpu(protocol):
    """Tensors without values tell: whoever asks for one raises. The GPU need not be there."""
    fusion_measures._weights.cache_clear()
    with FakeTensorMode():
        images = (torch.zeros(2, c, 176, 180, dtype=torch.uint8, device="cuda") for c in (3, 1, 3))
        found = fusion_metrics(*images, protocol=protocol)
    fusion_measures._weights.cache_clear()  # they hold no values either
    assert all(x.shape == (2,) and x.device.type == "cuda" for x in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_gpu_gives_the_numbers_of_the_cpu(protocol):
    images = [
        torch.cat([image(3 * seed + k, channels) for seed in range(3)])
        for k, channels in enumerate((3, 1, 3))
    ]
    expected = fusion_metrics(*images, protocol=protocol)
    on_gpu = [x.cuda() for x in images]
    found = fusion_metrics(*on_gpu, protocol=protocol)
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values.tolist(), rel=1e-6), name
    torch.cuda.set_sync_debug_mode("error")
    try:
        fusion_metrics(*on_gpu, protocol=protocol)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_stay_in_their_ranges(protocol):
    ranges = dict.fromkeys(("Qabf", "Nabf", "MS-SSIM"), (0, 1))
    ranges |= {"EN": (0, 8), "SD": (0, 127.5), "CC": (-1, 1), "SCD": (-2, 2)}
    most = 2 if protocol == "cddfuse" else 1
    ranges["SSIM"] = (-most, most)
    for seed in range(3):
        found = fusion_metrics(*(image(3 * seed + k) for k in range(3)), protocol=protocol)
        for name, (low, high) in ranges.items():
            assert low <= found.get(name, torch.tensor(low)).item() <= high, name
        assert all(found[name].item() >= 0 for name in ("SF", "AG", "MI", "MSE", "VIF"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_fused_image_that_differs_from_a_source_by_a_constant(protocol):
    """Nothing was added to that source, which leaves the other half of SCD."""
    rgb, thermal = image(0, 3) // 2, image(1)
    found = fusion_metrics(rgb, thermal, rgb + 7, protocol=protocol)["SCD"].item()
    levels = cv2.cvtColor(rgb[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY).astype(float)
    added = levels - as_array(thermal)
    assert found == pytest.approx(np.corrcoef(added.ravel(), levels.ravel())[0, 1], abs=1e-3)


def test_ms_ssim_is_that_of_opencv_s_blur():
    """Wang's recipe level by level: windows inside the image, then means of 2x2 pixels."""
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(x):
        return cv2.GaussianBlur(x, (11, 11), 1.5)[5:-5, 5:-5]

    def similarity(x, y):
        product = 1.0
        for weight in weights:
            mean_x, mean_y = blur(x), blur(y)
            variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
            structure = (2 * (blur(x * y) - mean_x * mean_y) + c2) / (variances + c2)
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            is_last = weight == weights[-1]
            product *= (structure * luminance if is_last else structure).mean() ** weight
            x, y = (
                cv2.resize(z, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for z in (x, y)
            )
        return product

    a, b, f = (image(seed, 1, (176, 192)) for seed in range(3))
    mixed = (0.5 * f + 0.3 * a + 0.2 * b).round().to(torch.uint8)
    expected = np.mean([similarity(as_array(x), as_array(mixed)) for x in (a, b)])
    found = fusion_metrics(a, b, mixed, protocol="strict")["MS-SSIM"].item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_entropy_and_deviation_by_hand():
    half = constant(10)
    half[..., :90] = 250
    found = fusion_metrics(half, half, half)
    assert found["EN"].item() == pytest.approx(1)
    assert found["SD"].item() == pytest.approx(120)
    assert found["SF"].item() == pytest.approx(math.sqrt(240**2 / 179))
    assert found["MI"].item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("images", "protocol", "message"),
    [
        ((image(0), image(1), image(2)), "fast", "unknown protocol 'fast'; known: cddfuse, tang"),
        ((image(0).float(), image(1), image(2)), "tang", "rgb must be uint8"),
        ((image(0), image(1)[0], image(2)), "tang", "thermal must be uint8"),
        ((image(0), image(1, 3)[:, :2], image(2)), "tang", "thermal must be uint8"),
        ((image(0), image(1), image(2)[..., 1:]), "tang", "fused is .* sizes must agree"),
        ((image(0)[:0],) * 3, "tang", "at least one image"),
        ((image(0)[..., :1],) * 3, "tang", "at least 2x2"),
    ],
    ids=["protocol", "dtype", "dimensions", "channels", "size", "none", "line"],
)
def test_wrong_arguments_are_named(images, protocol, message):
    with pytest.raises(ValueError, match=message):
        fusion_metrics(*images, protocol=protocol)
