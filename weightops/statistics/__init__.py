"""Statistics of what a model does to data: named tensors, like weights."""
