"""EDM (Karras et al. 2022, arXiv 2206.00364): diffusion in pixel space."""
