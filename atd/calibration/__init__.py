"""What calibrated passes know of a model: text, moments of inputs, sensitivities, gradients."""
