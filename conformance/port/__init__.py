"""Runs a port through the levels and gives a verdict on every case."""
