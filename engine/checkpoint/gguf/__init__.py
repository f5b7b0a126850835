"""GGUF files, opened as a model directory whose config and tokenizer transformers reads from the file."""
