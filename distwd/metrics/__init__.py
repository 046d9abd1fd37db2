"""Numbers about the whole model: local float64 partials, one all-reduce, formulas."""
