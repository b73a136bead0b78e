"""The worker: receive, admit, run, complete."""
