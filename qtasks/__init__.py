"""QTasks: a task queue made of parts."""
