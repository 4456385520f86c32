"""Lazy linear algebra on named tensors: sources, linear forms and the kernels under them."""
