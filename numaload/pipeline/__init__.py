"""Bring weights from files into the caller's memory: read, dequantized and put in place."""
