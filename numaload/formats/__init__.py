"""Descriptions of file formats: what is where in a file. Nothing here computes on weights."""
