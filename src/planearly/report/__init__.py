"""Figures and pages, and sentences about differences. Draws what it is given; imports methods and
the ground-level modules."""
