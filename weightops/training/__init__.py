"""Training: fine-tune a model in one process, in several, or on nodes that meet rarely."""
