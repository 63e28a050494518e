"""dit2deploy: from a quantized Diffusion Transformer to a small, fast, verified engine."""
