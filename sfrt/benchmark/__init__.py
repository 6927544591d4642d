"""Measurements of sfrt, as `sfrt bench` and the suites in bench/ make and state them (README, "What is measured")."""
