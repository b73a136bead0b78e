"""The endpoints: a module with a router for each subject."""
