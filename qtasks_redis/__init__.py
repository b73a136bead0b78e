"""The redis package."""
