"""Measurements of sfrt, named and written as the benchmark protocol says (README, "What is measured")."""
