"""Schedules and plans inside a diffusers pipeline: routing pruned weights, applying a run, removing it."""
