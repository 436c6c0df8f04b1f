"""How many answers of each tier agreed with full depth, from the file that `polar evaluate --json` wrote.

The evaluation serves every prompt of its set at full depth and by the router; that is what a promise of agreement is
settled by. Knows no usage.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from polar_billing.errors import QueryError
from polar_billing.statements.lines import Agreement

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["evaluated_agreement"]

_TIER: Final = re.compile(r"router \((.+)\)")


def evaluated_agreement(file: Path) -> dict[str, Agreement]:
    """Tier → what was measured over all prompts of the evaluation.

    Raises:
        QueryError: The file cannot be read, or is none of `polar evaluate --json`.
    """
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))["sets"][0]
        found = dict(_tiers(whole))
    except OSError as error:
        raise QueryError(f"{str(file)!r} cannot be read ({error.strerror}).", hint="Check its path.") from error
    except (ValueError, TypeError, LookupError) as error:
        raise QueryError(
            f"{str(file)!r} holds no evaluation ({type(error).__name__}: {error}).",
            hint="Write one with `polar evaluate --data FILE --json > evaluation.json`.",
        ) from error
    return found


def _tiers(whole: dict[str, Any]) -> list[tuple[str, Agreement]]:
    compared = int(whole["prompts"])
    shares = {system["name"]: system["agreement"][0] for system in whole["systems"] if system["role"] == "router"}
    tiers = ((_TIER.fullmatch(name), share) for name, share in shares.items())
    return [(named[1], Agreement(round(share * compared), compared)) for named, share in tiers if named]
