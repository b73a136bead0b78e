"""Serializers: how values become bytes and back."""
