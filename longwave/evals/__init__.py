"""Measuring what a method costs: one file a measurement."""
