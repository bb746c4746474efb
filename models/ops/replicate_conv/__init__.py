"""3x3 convolution of a map with its border repeated: one public function, two backends."""

from models.ops.replicate_conv.dispatch import replicate_conv

__all__ = ["replicate_conv"]
