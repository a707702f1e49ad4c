"""Compares many conversions: grids of recipes and options over one model, and a random matrix."""
