"""QTasks inside other frameworks, a module for each. Only that module imports the framework."""
