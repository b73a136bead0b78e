"""The postgres package."""
