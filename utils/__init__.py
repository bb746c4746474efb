"""Helpers that know nothing of the network: metrics, images, logging, ranks."""
