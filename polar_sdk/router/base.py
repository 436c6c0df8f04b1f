"""What a router is: prompt tokens in, a program and the router's own cost out. Knows no text and no money."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.engine.route import Route


class Router(ABC):
    """Maps a prompt to a program. Implementations hold no state that a request changes."""

    kind: ClassVar[str]
    """Name of the kind, as it stands in usage records."""
    version: str = "1"
    """Version of the rule or of the trained weights."""

    @abstractmethod
    def route(self, tokens: Sequence[int]) -> Route:
        """Choose the program for one prompt of that many token ids."""
