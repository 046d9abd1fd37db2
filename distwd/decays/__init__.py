"""The rules: one short class each."""
