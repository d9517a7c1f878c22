"""Whole-slide images as numbers: reading, tissue, grids, cohorts. No torch here."""
