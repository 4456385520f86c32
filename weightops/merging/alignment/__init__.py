"""Permutation of one model's units to those of another: Git Re-Basin's weight matching."""
