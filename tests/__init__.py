"""Tests, one file per room, and what several of them share."""
