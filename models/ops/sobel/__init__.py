"""Fixed Sobel gradients, shared by the loss and the fusion head: two backends."""

from models.ops.sobel.dispatch import sobel

__all__ = ["sobel"]
