"""Quantized layers in PyTorch: the reference that engines are compared with, and what is exported."""
