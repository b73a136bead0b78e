"""What the worker does: a module and a router for each subject."""
