"""Passes calls from the threads and loops of callers to the I/O thread, and replies back."""
