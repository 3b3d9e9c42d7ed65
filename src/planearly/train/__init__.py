"""The one training loop, optimisers, objectives and their state on disk. Imports model and
data."""
