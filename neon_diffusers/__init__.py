"""Pipelines of diffusers as generators: opened by an allow-list of classes, sampled with noise of the images' own."""
