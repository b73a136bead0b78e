"""Which project the name `qtasks` imports: ours, or another one from the package index."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import Distribution

NAME = "qtasks"
GROUP = "qtasks.backends"
"""The group of entry points of backends. Our distribution has some, the other project none."""
HOME = Path(__file__).parents[1]
"""The directory that holds our packages: `site-packages`, or a checkout."""


def refuse_other_package() -> None:
    """Raise `ImportError` if `import qtasks` would import another project than ours."""
    module = sys.modules.get(NAME)
    spec = module.__spec__ if module is not None else find_spec(NAME)
    if spec is None or spec.origin is None:
        return
    other = Path(spec.origin).parent
    if not os.path.exists(HOME / NAME) or os.path.samefile(other, HOME / NAME):
        return
    raise ImportError(
        f"{spec.origin} is another project named {NAME}, in front of ours in {HOME}: "
        f"take it off Python's path (pip uninstall {NAME}), then install ours from its checkout"
    )


def our_distribution() -> Distribution | None:
    """Return our installed distribution. None: our packages are a checkout on the path."""
    from importlib.metadata import distributions  # slow to import

    return next((d for d in distributions(name=NAME) if _is_ours(d)), None)


def why_unregistered() -> str | None:
    """Return in one line why none of our backends is registered. None: they are registered."""
    from importlib.metadata import distributions  # slow to import

    first = next(iter(distributions(name=NAME)), None)
    if first is None:
        return f"{HOME} is not installed, so its backends are not found: pip install {HOME}"
    if _is_ours(first):
        return None
    return (
        f"the installed {NAME} {first.version} is another project of that name, so the backends "
        f"in {HOME} are not found: pip uninstall {NAME}, then pip install {HOME}"
    )


def _is_ours(distribution: Distribution) -> bool:
    return any(entry.group == GROUP for entry in distribution.entry_points)
