"""Programs around the model: weights, data sets, demo. Each file is started by its path."""
