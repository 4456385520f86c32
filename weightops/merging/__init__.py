"""Merging: averages, merge methods, recipes, and layers of several models in one."""
