"""Self-training by LoRA (arXiv 2106.09685): factors of low rank are trained beside the layers of a frozen network."""
