"""Running functions: definitions, executors, plugins around a run, failures."""
