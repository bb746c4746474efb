"""What Triton kernels over maps (planes, pixels) share; see triton_support.PlaneTile."""

import triton
import triton.language as tl


@triton.jit
def own_share(length, PLANES: tl.constexpr, PIXELS: tl.constexpr):
    """A program's PIXELS of the `length` pixels of a map, and its first map.

    Programs lie along one axis of the grid: the others end at 65535.
    """
    across = tl.cdiv(length, PIXELS)
    program = tl.program_id(0)
    return program % across * PIXELS + tl.arange(0, PIXELS), program // across * PLANES


@triton.jit
def take(x, at, inside):
    """Numbers in float32; 0 where not inside."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
