"""Studies: grids of recipes and options over one model, and the experiment with a Gaussian matrix."""
