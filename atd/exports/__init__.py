"""Writes models in the formats of other tools: one module per format, a table of them."""
