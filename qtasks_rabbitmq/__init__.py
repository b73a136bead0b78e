"""The rabbitmq package."""
