"""The wheel, installed into clean environments: what people get who have no checkout."""
