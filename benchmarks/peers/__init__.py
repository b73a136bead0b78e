"""Compares QTasks with other task queues, each used as its documentation says. See `__main__`."""
