"""The sqlite package."""
