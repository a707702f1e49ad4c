"""The mathematics of ternary sums: arrays in, arrays out.

Nothing here knows of files, graphs or options of passes.


levels           the sums that N scales and trits can make, and which of them is nearest to a weight
greedy           one base after the other, on the residual
least_squares    all scales of a group together with its trits: alternating least squares
error_feedback   trits whose errors cancel in the outputs of a layer: GPTQ, coordinate descent,
                 refits
second_moments   what a layer's inputs say about errors of its weights: cost, damping, corrected
                 targets
rmse             the error of a decomposition
chunks           matrices in chunks of equal shape, one per core
rotations        random Hadamard rotations
options          what a matrix may become, and how many bytes that takes
allocation       one option for each matrix, with the least loss within a budget of bytes
"""
