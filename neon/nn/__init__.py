"""Layers that several architectures are made of."""
