"""Volumes through a network, metrics, tables, pictures and pages, and what a prediction leaves."""
