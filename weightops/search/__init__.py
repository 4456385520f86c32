"""Search: measure edits of a model, and choose their coefficients on validation data."""
