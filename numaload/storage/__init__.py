"""Files: opening, reading at full speed, what of them is in RAM."""
