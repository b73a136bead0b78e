"""The engine and its faces, in memory."""
