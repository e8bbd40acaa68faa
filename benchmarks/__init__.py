"""Measurements; they print, they assert nothing."""
