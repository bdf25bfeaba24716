"""Measurements of the engines in process: `python -m kvsluice.benchmarks.<name> --help`. Results lie in `results/`."""
