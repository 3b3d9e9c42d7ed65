"""Likelihood of held-out text. Imports model and data."""
