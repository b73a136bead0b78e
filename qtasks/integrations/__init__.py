"""QTasks inside other frameworks: a module for each, which imports it; nothing else does."""
