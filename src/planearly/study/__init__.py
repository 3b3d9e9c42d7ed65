"""Grids of runs, compared: tables, figures, claims, a page. Imports stages and every package below;
not studies, which are what it is asked."""
