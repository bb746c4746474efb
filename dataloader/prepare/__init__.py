"""From the archives of data sets to the layout that the loader reads (datasets/README.md)."""
