"""Gather what a report shows of a model: the machine, what was found, where each tensor is."""
