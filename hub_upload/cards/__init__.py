"""The cards of models and datasets, made of what has been recorded."""
