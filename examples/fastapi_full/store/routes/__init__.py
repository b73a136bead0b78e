"""What clients may ask for: a module and a router for each subject."""
