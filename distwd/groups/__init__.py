"""Which parameters decay, by how much, and when."""
