"""Depthwise convolution with its activation: one public function, two backends."""

from models.ops.depthwise.dispatch import depthwise_conv

__all__ = ["depthwise_conv"]
