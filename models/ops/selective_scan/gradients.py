"""Autograd for a scan that is a pair of custom operators, so that torch.compile sees through it."""

from collections.abc import Callable

from torch import Tensor


def register_gradients(forward, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Make `backward` the gradient of the custom operator `forward`.

    Args:
        forward: (u, delta, A, B, C, D, delta_bias, delta_softplus) -> y and the states kept for
            the backward pass.
        backward: (grad_y, u, delta, A, B, C, D, delta_bias, states, delta_softplus) -> gradients of
            the seven tensors; those of an absent D or delta_bias are not looked at.
    """

    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.delta_softplus = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_y: Tensor | None, _grad_states: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # once: where they are computed anew, a second time fails
        *gradients, grad_D, grad_bias = backward(grad_y, *saved, ctx.delta_softplus)
        D, delta_bias = saved[5:7]
        return (
            *gradients,
            None if D is None else grad_D,
            None if delta_bias is None else grad_bias,
            None,
        )

    forward.register_autograd(differentiate, setup_context=setup_context)
