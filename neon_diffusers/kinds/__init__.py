"""The kinds of pipelines that are served, one module each.

A kind is a subclass of `neon_diffusers.kinds.kind.Kind`, named in `neon_diffusers.kinds.served`.
"""
