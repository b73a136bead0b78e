"""Serializers: how values become bytes, and bytes become values again."""
