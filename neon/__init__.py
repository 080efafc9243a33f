"""Neon: improve a trained image generator by stepping away from its own self-training.

theta_neon = (1 + w) theta_r - w theta_s: w = 0 is the base, w = -1 the self-trained model, w > 0 Neon.
"""

__version__ = "0.1.0"
