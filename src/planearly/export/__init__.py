"""Models as others load them: Hugging Face folders, GGUF files, bundles. Imports model, cluster,
data and what lies below; nothing of training."""
