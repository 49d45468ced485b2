"""The parts of `build.py`: who builds (locks, workers), what (plan, hashes), and how one patient is built."""
