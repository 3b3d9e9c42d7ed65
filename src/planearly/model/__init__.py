"""The dense transformer, projected networks, mixtures, adapters, and models of others. Knows
nothing of training or data."""
