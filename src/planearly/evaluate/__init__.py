"""Likelihood of held-out text, and continuations. Imports model and data."""
