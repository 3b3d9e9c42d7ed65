"""Documents to windows of tokens, and batches of them: readers, tokenizer, datasets, packing,
sampling. Imports nothing of planearly but ground-level modules."""
