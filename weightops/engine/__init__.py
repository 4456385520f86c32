"""Run expressions: into memory, into files, or down to numbers. Streams; memory is bounded by chunks, not by the model."""
