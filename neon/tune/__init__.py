"""The choice of w, guidance and budget: search, prediction, and the run that records them."""
