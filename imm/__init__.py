"""IMM (Zhou et al. 2025, arXiv 2503.07565): few-step flows by matching moments, of latents or of pixels."""
