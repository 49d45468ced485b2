"""Experiments of many runs: plans, what makes them fair, their statistics and their report."""
