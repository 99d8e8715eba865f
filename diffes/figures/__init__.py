"""Figures, tables and cards of results."""
