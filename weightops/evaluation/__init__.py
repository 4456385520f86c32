"""Evaluators: what scores a model on a task."""
