"""Helpers that depend on no other part of weightops but its errors."""
