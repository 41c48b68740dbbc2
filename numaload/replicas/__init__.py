"""Replicas: the model file itself, byte for byte, once per node. Planned, built, verified, kept."""
