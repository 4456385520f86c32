"""Names of the files that weightops writes beside weights, which are no part of a model."""

from __future__ import annotations

CARD, RECIPE = "README.md", "recipe.yaml"
"""The model card, and the recipe that repeats a merge."""

EVAL_RESULTS = ".eval_results"
"""The folder of test scores that the Hugging Face Hub reads."""

RESULTS = (
    r"(summary|training|lofi|comparison)\.json|.*\.jsonl|(report|changed)\.html|(recipe|run)\.yaml"
    r"|(frontier|accuracy|perplexity|score|figure|geometry)\.(png|svg)"
)
"""A pattern of the names of results: numbers, pages, pictures and what repeats a run."""
