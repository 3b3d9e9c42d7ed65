"""Figures and pages, and sentences about differences. Draws what it is given."""
