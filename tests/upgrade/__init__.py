"""Processes of an earlier release beside those of this one."""
