"""xAR (Ren et al. 2025, arXiv 2502.20388): latents of an image cell by cell, each by flow matching."""
