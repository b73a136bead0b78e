"""Faults of real servers under load: nothing is lost, and work goes on by itself."""
