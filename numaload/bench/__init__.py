"""Measuring: each figure beside its baselines, in one run, in turns, medians of some rounds.

Machines are shared and their speed drifts, so what counts are ratios of neighbours in time.
"""
