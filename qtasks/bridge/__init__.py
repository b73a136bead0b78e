"""The crossing between the caller's threads and loops and the I/O thread."""
