"""Figures, the report and the terminal."""
