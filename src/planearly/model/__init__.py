"""The dense transformer, projected networks, mixtures, adapters, and models of others. Knows
nothing of training, data or clusters; imports methods, keys and what lies below them."""
