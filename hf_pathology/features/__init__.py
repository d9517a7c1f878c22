"""Tiles turned into features by any encoder, and kept one file per slide."""
