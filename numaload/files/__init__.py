"""Open files, read them at full speed, and find what of them is in RAM."""
