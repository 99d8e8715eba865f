"""Measurements: fitness on probes, metrics, and the cost of a schedule."""
