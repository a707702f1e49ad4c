"""Reads and writes checkpoints and tokenizers. No other room touches the files of a model."""
