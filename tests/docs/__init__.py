"""The docs hold what the code says."""
