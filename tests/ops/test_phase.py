"""Spectra with another magnitude: the reference, and the Triton kernels against it."""

import pytest
import torch

from models.ops.phase import with_magnitude
from tests.ops.comparison import assert_compiles, assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

TOLERANCE = 1e-6  # ||out - truth|| / ||truth|| of float32 arithmetic


def make_inputs(shape=(2, 3, 8, 7), device="cpu"):
    """A spectrum, a magnitude that is negative in places, and a gradient.

    One frequency nearly cancels, one is 0, as is the whole last map; one has only a real part, one
    is so large and one so small that their squares are not float32's.
    """
    generator = torch.Generator().manual_seed(sum(shape))
    spectrum, gradient = torch.randn(2, *shape, dtype=torch.complex64, generator=generator)
    spectrum[0, 0, 2, 3] *= 1e-6
    spectrum[0, 0, 4, 1] = 0
    spectrum[0, 0, 5, 0] = -2
    spectrum[0, 1, 0, 0] *= 1e25
    spectrum[0, 1, 1, 1] *= 1e-25
    spectrum[-1, -1] = 0
    magnitude = torch.randn(shape, generator=generator)
    return spectrum.to(device), magnitude.to(device), gradient.to(device)


def run(inputs, backend):
    """The result and both gradients."""
    *leaves, gradient = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = with_magnitude(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def assert_same(inputs):
    spectrum, magnitude, gradient = inputs
    wide = spectrum.to(torch.complex128), magnitude.double(), gradient.to(torch.complex128)
    expected = run(wide, "reference")
    with poisoned_empty():
        ours = run(inputs, "triton")
    for name, result, goal, given in zip(
        ("y", "spectrum", "magnitude"), ours, expected, (spectrum, spectrum, magnitude), strict=True
    ):
        assert result.dtype == given.dtype, name
        parts = [torch.view_as_real(x) if x.is_complex() else x for x in (result, goal)]
        for ours_of_map, goal_of_map in zip(*(x.flatten(0, 1) for x in parts), strict=True):
            if goal_of_map.any():
                scale = 1 / goal_of_map.abs().max().item()  # norms of what is tiny would vanish
                assert_near(name, ours_of_map.double() * scale, goal_of_map * scale, TOLERANCE)
            else:
                assert not ours_of_map.any(), name
    assert torch.equal(ours[0] == 0, expected[0] == 0)
    large = (torch.view_as_real(x[1])[0, 1, 0, 0].double() for x in (ours, expected))
    torch.testing.assert_close(*large, rtol=1e-3, atol=0)  # far smaller than its neighbours'


class TestReference:
    def test_is_the_magnitude_times_the_spectrum_over_its_own(self):
        spectrum, magnitude, _ = make_inputs()
        torch.testing.assert_close(
            with_magnitude(spectrum, magnitude), magnitude * torch.sgn(spectrum), rtol=0, atol=0
        )

    def test_gradients_are_those_of_the_quotient(self):
        spectrum, magnitude, gradient = make_inputs()
        means = spectrum.abs().mean((-2, -1), keepdim=True)
        gradient = gradient * (spectrum.abs() > 0.02 * means)
        leaves = [spectrum.requires_grad_(), magnitude.requires_grad_()]
        expected = torch.autograd.grad(magnitude * torch.sgn(spectrum), leaves, gradient)
        given = torch.autograd.grad(with_magnitude(*leaves), leaves, gradient)
        torch.testing.assert_close(given, expected)
        assert (given[0].abs() > 0).sum() > 200

    def test_gradient_is_limited_where_a_frequency_nearly_cancels(self):
        spectrum, magnitude, gradient = make_inputs()
        given, _ = run((spectrum, torch.ones_like(magnitude), gradient), "reference")[1:]
        means = spectrum.abs().mean((-2, -1), keepdim=True)
        assert given.isfinite().all()
        assert (given.abs() <= 1.001 * gradient.abs() * 100 / means).all()
        turn = gradient * torch.sgn(spectrum).conj()  # its imaginary part alone turns the phase
        limit = turn.imag.abs() * 100 / means
        torch.testing.assert_close(given.abs()[0, 0, 2, 3], limit[0, 0, 2, 3])
        assert (given[-1, -1] == 0).all()


def test_wrong_arguments_are_named():
    spectrum, magnitude, _ = make_inputs()
    with pytest.raises(ValueError, match=r"got \(2, 3, 8, 7\) torch.complex64 and \(2, 3, 8, 6\)"):
        with_magnitude(spectrum, magnitude[..., 1:])
    with pytest.raises(ValueError, match="torch.float64"):
        with_magnitude(spectrum, magnitude.double())
    with pytest.raises(ValueError, match="torch.float32 and"):
        with_magnitude(magnitude, magnitude)
    with pytest.raises(ValueError, match="unknown with_magnitude backend 'cufft'"):
        with_magnitude(spectrum, magnitude, backend="cufft")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        with_magnitude(*make_inputs()[:2], backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
def test_interpreted_refuses_complex128():
    spectrum, magnitude, _ = make_inputs()
    with pytest.raises(RuntimeError, match="use 'reference' for float64"):
        with_magnitude(spectrum.to(torch.complex128), magnitude.double(), backend="triton")


@interpreted
@pytest.mark.parametrize("shape", [(2, 3, 8, 7), (1, 2, 6, 4)], ids=str)
def test_interpreted_equals_reference(shape):
    assert_same(make_inputs(shape))


@interpreted
def test_interpreted_other_layouts():
    spectrum, magnitude, gradient = make_inputs()
    spectrum, gradient = spectrum.mT.contiguous().mT, gradient.conj()
    assert gradient.is_conj()
    assert_same((spectrum, magnitude.mT.contiguous().mT, gradient))


@interpreted
def test_interpreted_empty():
    spectrum = torch.zeros(0, 3, 4, 5, dtype=torch.complex64)
    results = run((spectrum, spectrum.real, spectrum), "triton")
    assert [x.shape for x in results] == [spectrum.shape] * 3


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.phase import triton as module

    spectrum, magnitude, gradient = make_inputs((1, 2, 6, 4))
    torch.library.opcheck(module._backward, (gradient, spectrum, magnitude))
    leaves = spectrum.clone().requires_grad_(), magnitude.clone().requires_grad_()
    torch.library.opcheck(module._forward, leaves)


@interpreted
def test_interpreted_compiles():
    spectrum, magnitude, _ = make_inputs((1, 2, 6, 4))
    leaves = [spectrum.requires_grad_(), magnitude.requires_grad_()]

    def call(spectrum, magnitude):
        return with_magnitude(spectrum, 2 * magnitude, backend="triton")

    assert_compiles(call, *leaves)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("shape", [(4, 192, 120, 81), (3, 5, 17, 12)], ids=str)
    def test_equals_reference(self, shape):
        assert_same(make_inputs(shape, "cuda"))
