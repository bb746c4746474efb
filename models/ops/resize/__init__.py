"""Bilinear resize of a map: one public function, two backends."""

from models.ops.resize.dispatch import bilinear_resize

__all__ = ["bilinear_resize"]
