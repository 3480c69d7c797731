"""Scans without labels: reading them, and the files that `predict.py` leaves."""
