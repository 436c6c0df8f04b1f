"""Which request ids of callers are being served by this process, and which were served last.

Knows no ledger: what it has forgotten, or what another process serves, is for the ledger to say.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Final

from polar_billing.errors import id_in_use

_REMEMBERED: Final = 10_000
"""Ids that were served; older ones are in the ledger by then, as a rule."""

Request = tuple[str, str]
"""Tenant and request id."""


class Claims:
    """Request ids, each claimed by one request. Safe in several threads and after a fork."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._serving: set[Request] = set()
        self._served: OrderedDict[Request, None] = OrderedDict()

    def claim(self, tenant: str, request_id: str) -> None:
        """Claim an id for a request that is about to run.

        Raises:
            ConflictError: Another request has it, or had it.
        """
        if self._process != os.getpid():
            self._start_anew()  # the parent's requests are its own
        request = (tenant, request_id)
        with self._lock:
            if request in self._serving:
                raise id_in_use(tenant, request_id, "is being served")
            if request in self._served:
                raise id_in_use(tenant, request_id, "was served before")
            self._serving.add(request)

    def give_up(self, tenant: str, request_id: str) -> None:
        """Forget the claim of a request that never began."""
        with self._lock:
            self._serving.discard((tenant, request_id))

    def served(self, tenant: str, request_id: str) -> bool:
        """Note that a request has its record; False if it had claimed nothing."""
        request = (tenant, request_id)
        if request not in self._serving:  # as most requests, whose ids are new; the set is safe to ask without the lock
            return request in self._served
        with self._lock:
            self._serving.discard(request)
            self._served[request] = None
            if len(self._served) > _REMEMBERED:
                self._served.popitem(last=False)
        return True
