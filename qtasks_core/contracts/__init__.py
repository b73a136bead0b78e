"""The contracts between the engine and its parts, one abstract class a file."""
