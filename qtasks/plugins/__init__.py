"""Plugins that come with QTasks, and the classes that you need to write your own."""

from qtasks.plugins.retries import Backoff, Retries
from qtasks_core.contracts.plugin import Again, Decision, GiveUp, Plugin, Proceed, Run

__all__ = ["Again", "Backoff", "Decision", "GiveUp", "Plugin", "Proceed", "Retries", "Run"]
