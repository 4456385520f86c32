"""Formats of weights files, and weights in memory."""
