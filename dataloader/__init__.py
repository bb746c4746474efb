"""From split lists on disk to batches of rgb, thermal, label and valid mask."""
