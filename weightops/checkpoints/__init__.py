"""Weights from files, refs and memory, and their match with other weights."""
