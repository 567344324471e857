"""Projecting channels onto a basis along time, and attending over the coefficients."""
