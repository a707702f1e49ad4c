"""The mathematics of ternary sums: arrays in, arrays out.

    levels            the sums that N scales and trits can make, and which is nearest to a weight
    greedy            one base after the other, on the residual
    least_squares     all scales of a group together with its trits: alternating least squares
    error_feedback    trits whose errors cancel in the outputs of a layer: GPTQ, coordinate descent
    sweeps            the visit of all columns, in blocks: level_walks, trellis_walks go through one
    second_moments    what a layer's inputs say about errors of its weights: cost, damping, target
    trellis           codes in which a trit counts in several rows; trellis_codes, trellis_feedback
    trellis_kernel    the search for the trits of such a code as one kernel on NVIDIA GPUs
    walk_kernel       what kernels that walk through columns have in common
    rmse              the error of a decomposition
    chunks            matrices in chunks of equal shape, one per core
    rotations         random Hadamard rotations
    options           what a matrix may become, and how many bytes that takes
    allocation        an option for every matrix, with the least loss within a budget of bytes
    budget            a budget over the matrices of a model, and what was decided

Nothing here knows of files, graphs or options of passes.
"""
