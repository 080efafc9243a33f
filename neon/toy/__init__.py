"""Neon on a 2-D Gaussian: `toy_appendix.ipynb` shows what these modules compute."""
