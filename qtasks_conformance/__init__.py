"""The conformance package."""
