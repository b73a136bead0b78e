"""The contracts between the engine and its components, one abstract class in each file."""
