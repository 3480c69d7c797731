"""Predict volumes, score them, and write tables, pictures, pages and predictions."""
