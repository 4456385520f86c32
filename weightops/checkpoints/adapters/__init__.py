"""Adapters of peft: read as edits of a base, put together, and written from task vectors."""
