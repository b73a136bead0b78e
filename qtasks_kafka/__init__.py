"""The kafka package."""
