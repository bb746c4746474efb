"""What follows a convolution: bias, activation, factor per image and residual, in one pass."""

from models.ops.epilogue.dispatch import epilogue

__all__ = ["epilogue"]
