"""Reports: results as JSON, tables, pictures and model cards."""
