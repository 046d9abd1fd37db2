"""Decay for an optimizer that already exists."""
