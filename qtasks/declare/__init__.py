"""Declaring tasks: routers, tasks, calls, and the handles that calls return."""
