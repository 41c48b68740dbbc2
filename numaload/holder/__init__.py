"""Processes that keep memory alive after the command that started them has ended."""
