"""Neon from Python: what `import neon` has."""
