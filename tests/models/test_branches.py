"""Branches side by side: the same results, in order, recorded or not."""

import pytest
import torch

from models.branches import in_parallel


def test_results_come_in_order():
    assert in_parallel((int.__add__, 1, 2), (str.upper, "a"), (list,)) == [3, "A", []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_recorded_branches_give_the_same_results():
    """Branches in branches; memory freed in one is not written to by another meanwhile."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = torch.randn(4, 256, 256, device="cuda", generator=generator) / 16
    given = torch.randn(64, 256, device="cuda", generator=generator)

    def grow(x, weight):
        for _ in range(20):
            x = torch.tanh(x @ weight) + 0.1 * x
        return x

    def both(x, first, second):
        return sum(in_parallel((grow, x, first), (grow, x.sin(), second)))

    def run():
        pair = in_parallel((both, given, *weights[:2]), (both, given.cos(), *weights[2:]))
        return pair[0] * pair[1]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(5):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
