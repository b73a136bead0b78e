"""The client: submitting messages, waiting for results, and what an app's life is."""
