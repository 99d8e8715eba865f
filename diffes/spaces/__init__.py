"""Schedules, the space of those that meet a budget, and the loop that searches it. Nothing here imports torch."""
