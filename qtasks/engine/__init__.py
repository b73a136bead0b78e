"""The engine: one I/O thread a process, a client and workers on it."""
