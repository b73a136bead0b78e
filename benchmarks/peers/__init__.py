"""QTasks beside other task queues, each as its documentation has it used. See `__main__`."""
