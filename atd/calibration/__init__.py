"""What calibrated passes know of a model: text, moments of activations, sensitivities, gradients."""
