"""VAR (Tian et al. 2024, arXiv 2404.02905): images as token maps, predicted from coarse to fine."""
