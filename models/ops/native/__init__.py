"""Scans in C++ for CPU: the source, and how it is compiled and loaded."""
