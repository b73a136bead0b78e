"""Plugins that come with QTasks, and what one needs to write another."""

from qtasks.plugins.retries import Backoff, Retries
from qtasks_core.contracts.plugin import Again, Decision, GiveUp, Plugin, Proceed, Run

__all__ = ["Again", "Backoff", "Decision", "GiveUp", "Plugin", "Proceed", "Retries", "Run"]
