"""Stateless building blocks: scans, wavelets, gradients. Knows nothing of the network."""
