"""What regsurgery costs, measured: `python -m benchmarks` runs the suite and writes `RESULTS.md` and `results.json`."""
