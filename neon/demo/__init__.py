"""Neon end to end on real images in three minutes: a small EDM of Fashion-MNIST, embedded with what scores it."""
