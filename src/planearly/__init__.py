"""planearly: which small language model to train for a domain, at what cost, and the training.

An implementation of D. Grangier, A. Katharopoulos, P. Ablin, A. Hannun, *Need a Small Specialized
Language Model? Plan Early!*, arXiv 2402.01093 ("the paper" in every docstring of this package).
"""

__version__ = "0.1.0"
