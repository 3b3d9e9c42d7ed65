"""Models as others load them: Hugging Face folders, GGUF files, bundles. Imports model and
cluster."""
