"""When does Neon help, and against what: controls on small models, row by row. `python benchmarks/run_study.py A`."""
