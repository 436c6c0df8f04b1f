"""The hash chain: one link per chained row, numbered per tenant, and the head of each tenant's chain.

* `polar_chain_link`  number, what it stands for (table and key), digest of that row, previous hash, own hash
* `polar_chain_head`  the last number and hash of each tenant; it moves forward only

A link outlives its row: retention deletes rows and keeps links. The tenant of rows that belong to no tenant,
such as price books, is the empty text. How hashes are made is `polar_billing.ledger.chain`'s to know.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, LargeBinary, String, Table

from polar_billing.ledger.schema.base import append_only, metadata, refuse_going_back

link_table: Final = Table(
    "polar_chain_link",
    metadata,
    Column("tenant", String(200), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # 1, 2, 3 … within the tenant
    Column("subject", String(40), nullable=False),  # the table of the row, without its prefix
    Column("key", String(100), nullable=False),  # its primary key, as text
    Column("digest", LargeBinary(32), nullable=False),
    Column("previous", LargeBinary(32), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Index("polar_chain_link_once", "subject", "key", unique=True),
    sqlite_with_rowid=False,  # kept in order of the chain, without a second index
)

head_table: Final = Table(
    "polar_chain_head",
    metadata,
    Column("tenant", String(200), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
)

append_only(link_table, same_row=None)  # a link put in another's place breaks the chain, which `verify` finds
refuse_going_back(head_table, "number")
