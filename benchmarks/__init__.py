"""What measures speed and memory: run by hand or by tests, on a bare machine with torch. Results lie in `results/`."""
