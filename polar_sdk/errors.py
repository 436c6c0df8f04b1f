"""Every error the engine raises on purpose, as one tree.

PolarError
├── InvalidRequestError (ValueError)      the caller's request cannot be served as it stands
│   ├── EmptyPromptError
│   ├── ContextWindowError                prompt and answer do not fit the model
│   ├── SamplingError                     a sampling setting outside its range
│   ├── UnknownTierError                  `compute=` names no tier of the policy
│   ├── ToleranceError                    `compute=` is a tolerance that the router cannot promise
│   ├── TagError                          a tag or tenant that cannot be stored
│   ├── LogitsHookError                   a logits hook that returns no usable logits
│   ├── GrammarError                      a schema or grammar that cannot be followed
│   └── CacheMemoryError (MemoryError)    its keys and values do not fit the memory reserved for them
├── IncompleteAnswerError (ValueError)    the answer ended before its schema or grammar did
├── RequestTimeoutError (TimeoutError)    the request ran longer than its `timeout`; retryable
├── BudgetExceededError                   a budget has no room for the request; exit code 3
├── QueueFullError                        too many requests are waiting; retryable
├── ProgramError (ValueError)             a program that cannot or may not run
│   ├── ProgramSyntaxError                the text form does not parse
│   ├── ProgramDepthError                 a layer the model does not have
│   ├── ProtectedLayerError               skips a layer that the policy protects
│   ├── VisitLimitError                   visits one layer more often than allowed
│   ├── MissingMapError                   uses a bridge or a fill that the model does not have
│   ├── CostCeilingError                  costs more than the policy's ceiling
│   └── ExportError                       no plain model computes what it computes
├── PolicyError (ValueError)              a policy file that is malformed or belongs to another model
├── RouterError (ValueError)              a router that cannot serve here
│   ├── RouterModelError                  it was trained for another model
│   ├── RouterDamagedError                one of its files is missing, altered or malformed
│   └── CertificateError                  its promise does not cover what would run
├── AuditError (ValueError)               answers cannot be audited as asked, or prompts kept
├── MapError (ValueError)                 bridges or fills that cannot be fitted or used here
│   ├── MapModelError                     they were fitted for another model
│   └── MapDamagedError                   one of their files is missing, altered or malformed
├── DraftHeadError (ValueError)           a draft head that cannot be trained or used here
│   └── DraftHeadDamagedError             its file is missing, altered or malformed
├── DataError (ValueError)                a calibration file that is missing, empty or malformed
│   └── CalibrationSizeError              too few prompts for the requested promise
├── ModelError                            the model cannot be loaded or run
│   ├── ModelNotFoundError (FileNotFoundError)
│   ├── ModelFetchError (ConnectionError)     retryable
│   ├── ModelDamagedError                 a checksum or a tensor is wrong
│   ├── UnsupportedArchitectureError
│   ├── DeviceError                       device, dtype or precision not available here
│   └── LogitsError                       the model computed NaN or infinity for a request, which ends
├── FolderError (OSError)                 a model folder cannot be written: no space, no permission
│   └── FolderExistsError (FileExistsError)  something is stored there already
├── SinkError (OSError)                   usage cannot be recorded; raised before compute starts
│   └── SinkNotFoundError
├── SandboxError (OSError)                code of a model cannot be run safely on this machine
└── MissingExtraError (ImportError)       an optional dependency is not installed

A message names the value, the limit and the fix on one line; `hint` repeats only the fix, for programs that show it
separately. For an unknown name, `did_you_mean` suggests the one that may have been meant. Knows nothing of torch, of
frameworks or of money.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from polar_sdk.usage import UsageRecord


class PolarError(Exception):
    """Base of every PoLar error.

    Attributes:
        hint: What the user can do about it, or None if the message says everything.
        retryable: True if the same call may succeed later without a change.
        exit_code: What the command `polar` exits with: 2 for the caller's mistake, 3 over a budget, 1 otherwise.
    """

    retryable: bool = False
    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.hint = hint


class InvalidRequestError(PolarError, ValueError):
    """The request cannot be served as it stands."""

    exit_code = 2


class EmptyPromptError(InvalidRequestError):
    """The prompt holds no text."""


class ContextWindowError(InvalidRequestError):
    """Prompt and answer together do not fit the model's context window."""


class SamplingError(InvalidRequestError):
    """A sampling setting is outside its range."""


class UnknownTierError(InvalidRequestError):
    """`compute=` names no tier of the policy in force."""


class ToleranceError(InvalidRequestError):
    """`compute=` is a tolerance outside what the router in force can promise."""


class TagError(InvalidRequestError):
    """A tenant or tag that cannot be stored on a usage record."""


class LogitsHookError(InvalidRequestError):
    """A logits hook returned no logits, or logits that allow no token."""


class GrammarError(InvalidRequestError):
    """A JSON schema, regular expression or grammar is malformed, unsupported, or cannot be followed."""


class CacheMemoryError(InvalidRequestError, MemoryError):
    """Keys and values of a request do not fit the memory reserved for them."""


class QueueFullError(PolarError):
    """Too many requests are waiting; try again when some have finished."""

    retryable = True


class IncompleteAnswerError(PolarError, ValueError):
    """An answer ended before what its schema or grammar requires: by `max_tokens`, a stop string or a cancellation.

    Attributes:
        text: The answer so far.
    """

    def __init__(self, message: str, *, hint: str | None = None, text: str = "") -> None:
        super().__init__(message, hint=hint)
        self.text = text


class RequestTimeoutError(PolarError, TimeoutError):
    """A request was stopped because it ran longer than its `timeout`.

    Attributes:
        usage: The record of the stopped request, exact to the last executed layer; in a batch, that of the first row
            that was stopped (the sink has the record of every row).
    """

    retryable = True

    def __init__(self, message: str, *, hint: str | None = None, usage: UsageRecord | None = None) -> None:
        super().__init__(message, hint=hint)
        self.usage = usage


class BudgetExceededError(PolarError):
    """A request was refused before any compute, because a budget has no room for it.

    Attributes:
        level: Level of the budget: tenant, project, user or key.
        name: Name of the project, user or key; on the tenant's own level, of the tenant.
        limit: The budget, exact decimal as text. Unit: `unit`.
        spent: What was used so far in the budget's window, exact decimal as text. Unit: `unit`.
        remaining: What is neither spent nor held, exact decimal as text; negative if more was spent. Unit: `unit`.
        needed: The maximum that the cheapest offer could have used, exact decimal as text. Unit: `unit`.
        unit: A currency's code, or `CU`.
        resets_at: When the budget's next window begins, in its own time zone.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        level: str | None = None,
        name: str | None = None,
        limit: str | None = None,
        spent: str | None = None,
        remaining: str | None = None,
        needed: str | None = None,
        unit: str | None = None,
        resets_at: datetime | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.level, self.name, self.unit = level, name, unit
        self.limit, self.spent, self.remaining, self.needed = limit, spent, remaining, needed
        self.resets_at = resets_at


class ProgramError(PolarError, ValueError):
    """A program that cannot or may not run on this model."""

    exit_code = 2


class ProgramSyntaxError(ProgramError):
    """The text form of a program does not parse."""


class ProgramDepthError(ProgramError):
    """The program names a layer that the model does not have."""


class ProtectedLayerError(ProgramError):
    """The program skips a layer that the policy protects."""


class VisitLimitError(ProgramError):
    """The program visits one layer more often than the policy allows."""


class MissingMapError(ProgramError):
    """The program uses a bridge or a fill that the model does not have."""


class CostCeilingError(ProgramError):
    """The program costs more FLOPs than the policy's ceiling."""


class ExportError(ProgramError):
    """No plain model computes what the program computes, or the model's weights are not available."""


class PolicyError(PolarError, ValueError):
    """A policy file is malformed or was made for another model."""

    exit_code = 2


class DataError(PolarError, ValueError):
    """A calibration file is missing, empty or malformed."""

    exit_code = 2


class CalibrationSizeError(DataError):
    """Too few calibration prompts for the requested promise."""


class RouterError(PolarError, ValueError):
    """A router cannot serve here."""

    exit_code = 2


class RouterModelError(RouterError):
    """The router was trained for another model."""


class RouterDamagedError(RouterError):
    """One of the router's files is missing, altered or malformed."""


class CertificateError(RouterError):
    """The router's promise does not cover what would run."""


class AuditError(PolarError, ValueError):
    """Answers cannot be audited as asked, or prompts of audited requests cannot be kept."""

    exit_code = 2


class MapError(PolarError, ValueError):
    """Bridges or fills cannot be fitted or used here."""

    exit_code = 2


class MapModelError(MapError):
    """The maps were fitted for another model."""


class MapDamagedError(MapError):
    """One of the maps' files is missing, altered or malformed."""


class DraftHeadError(PolarError, ValueError):
    """A draft head cannot be trained or used here."""

    exit_code = 2


class DraftHeadDamagedError(DraftHeadError):
    """The file of a draft head is missing, altered or malformed."""


class ModelError(PolarError):
    """The model cannot be loaded or run."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """There is no model with that alias, hub id, folder or file."""

    exit_code = 2


class ModelFetchError(ModelError, ConnectionError):
    """The model could not be downloaded."""

    retryable = True


class ModelDamagedError(ModelError):
    """A checksum does not match or a weight is not finite."""


class UnsupportedArchitectureError(ModelError):
    """The engine has no family for this architecture."""

    exit_code = 2


class DeviceError(ModelError):
    """The requested device, dtype or precision is not available here."""

    exit_code = 2


class LogitsError(ModelError):
    """The model computed logits from which no token can be chosen: NaN or infinity. Other requests continue."""


class FolderError(PolarError, OSError):
    """A model folder cannot be written."""


class FolderExistsError(FolderError, FileExistsError):
    """Something is already stored where a model folder is to be written."""

    exit_code = 2


class SinkError(PolarError, OSError):
    """Usage cannot be recorded; raised before any compute, so nothing runs unmetered."""


class SinkNotFoundError(SinkError):
    """No meter is installed for the requested ledger."""


class SandboxError(PolarError, OSError):
    """Code that a model wrote cannot be run safely on this machine."""


class MissingExtraError(PolarError, ImportError):
    """An optional dependency of polar-llm is not installed."""

    exit_code = 2


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name most similar to `name`, or None if none is similar.

    Args:
        name: The unknown name.
        known: The names that are valid.
        cutoff: Minimum similarity, from 0 (anything) to 1 (equal).
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or otherwise all of them."""
    names = sorted(known)
    near = nearest(name, names)
    return f"did you mean {near!r}?" if near else f"choose from: {', '.join(names)}."
