"""The command line, `qtasks`. Only this package imports click; `import qtasks` does not."""

from qtasks.cli.main import main

__all__ = ["main"]
