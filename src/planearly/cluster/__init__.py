"""Embeddings, clusters, histograms and the weights and selections that follow from them. Imports
data and what lies below."""
