"""Grids of runs, compared: tables, figures, claims, a page. Imports stages and report."""
