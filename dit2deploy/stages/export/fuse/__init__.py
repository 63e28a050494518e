"""Fusing passes of the `fused` form: one a file; each takes the model and the layers' outputs and gives these back."""
