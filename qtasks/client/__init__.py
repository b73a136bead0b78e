"""The client: it submits messages and waits for results. The start and stop of an app."""
