"""The tasks: a module with a router for each subject."""
