"""Maps with their borders repeated outward, and without them: two backends."""

from models.ops.padding.dispatch import crop, replicate_pad

__all__ = ["crop", "replicate_pad"]
