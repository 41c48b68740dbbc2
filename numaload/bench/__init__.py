"""Measurements: each figure stands beside its baselines, taken in turns in one run.

Machines are shared and their speed drifts, so only ratios of neighbours in time count.
"""
