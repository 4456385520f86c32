"""The Hugging Face Hub: downloads, uploads and model cards."""
