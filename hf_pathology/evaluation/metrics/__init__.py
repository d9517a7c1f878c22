"""Metrics as `evaluate` modules, shipped because none is bundled offline."""
