"""Whole models of the NumPy twin."""
