"""Libraries of models, and the folders that describe their models."""
