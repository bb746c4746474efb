"""Spectra with another magnitude and their own phase: one public function, two backends."""

from models.ops.phase.dispatch import with_magnitude

__all__ = ["with_magnitude"]
