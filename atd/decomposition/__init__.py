"""The mathematics of ternary sums: arrays in, arrays out. Nothing here knows of files, graphs or options."""
