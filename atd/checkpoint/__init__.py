"""The only file I/O: reading and writing checkpoints, tokenizers, and the cache folder."""
