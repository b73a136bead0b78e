"""The public face in the places where people use it."""
