"""Merge methods: pure functions on the tensors of one name."""
