"""GGUF files: opened as a model directory, with config and tokenizer as transformers reads them from the file."""
