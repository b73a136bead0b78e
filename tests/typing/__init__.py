"""What a type checker makes of code that uses QTasks."""
