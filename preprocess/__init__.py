"""Preparation of training slices and test volumes from raw scans, pictures or phantoms."""
