"""Workflows: edits from end to end, from training to the folder of results."""
