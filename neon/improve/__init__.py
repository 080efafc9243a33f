"""The whole method as one run: a synthetic set, a self-training, the choice of w, the improved model and its report."""
