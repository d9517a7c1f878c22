"""Tiles on their way to training: the stream, the views, labelled tile folders."""
