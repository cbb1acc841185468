"""Tables of the job database, for SQLite and PostgreSQL, and their version."""

from __future__ import annotations

import logging

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    select,
    text,
)

from sr_platform.errors import ConfigError

SCHEMA_VERSION = 1
"""Of the tables below. Whoever changes them raises it and adds to `_MIGRATIONS` what takes the version before there."""
_MIGRATIONS: dict[int, tuple[str, ...]] = {}
# Any number that nobody else locks in this database.
_SCHEMA_LOCK = 0x66616974

logger = logging.getLogger(__name__)

# Ids are compared byte by byte, whatever language a database was made for.
_ID = String(64).with_variant(String(64, collation="C"), "postgresql")
_JSON = JSON(none_as_null=True)
metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

jobs = Table(
    "jobs",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("key_id", _ID, nullable=False),
    Column("idempotency_key", String(255)),
    Column("request_digest", String(64), nullable=False),
    Column("request", _JSON, nullable=False),
    Column("input_name", Text, nullable=False),
    Column("input_width", Integer, nullable=False),
    Column("input_height", Integer, nullable=False),
    Column("megapixels", Double, nullable=False),
    Column("num_tiles", BigInteger, nullable=False),
    Column("work", Double, nullable=False),
    Column("estimated_s", Double, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("webhook_url", Text),
    Column("trace_id", String(64), nullable=False),
    Column("submitted_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("state", String(16), nullable=False),
    Column("phase", String(32), nullable=False),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("preview", LargeBinary),
    Column("preview_step", Integer, nullable=False),
    Column("owner", Text),
    Column("attempt", Integer, nullable=False),
    Column("num_lost_attempts", Integer, nullable=False),
    Column("lease_until", Double),
    Column("reserved_by", Text),
    Column("reserved_until", Double),
    Column("cancel_requested", Boolean, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    Column("result", _JSON),
    Column("problem", _JSON),
    Column("device_seconds", Double),
    Column("model_version", Text),
    Column("manifest_digest", Text),
)
Index("jobs_idempotency", jobs.c.key_id, jobs.c.idempotency_key, unique=True)
Index("jobs_queue", jobs.c.state, jobs.c.priority.desc(), jobs.c.submitted_at, jobs.c.id)
Index("jobs_of_key", jobs.c.key_id, jobs.c.id)
Index("jobs_expiry", jobs.c.expires_at)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("job_id", _ID, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("due_at", Double, nullable=False, index=True),
    Column("owner", Text),
)

keys = Table(
    "keys",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("name", String(100), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("requests_per_minute", Double),
    Column("megapixels_per_day", Double),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    # The bucket of the rate limit: requests that may be sent at once, as it was at that time.
    Column("allowance", Double),
    Column("allowance_at", Double),
)
# A name may be given again once its key is revoked.
Index(
    "keys_name",
    keys.c.name,
    unique=True,
    sqlite_where=keys.c.revoked_at.is_(None),
    postgresql_where=keys.c.revoked_at.is_(None),
)

usage = Table(
    "usage",
    metadata,
    Column("key_id", _ID, primary_key=True),
    Column("day", Integer, primary_key=True),  # days since the epoch, UTC
    Column("num_requests", BigInteger, nullable=False),
    Column("megapixels", Double, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("owner", String(255), primary_key=True),
    Column("info", _JSON, nullable=False),
    Column("reported_at", Double, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("lease_until", Double, nullable=False),
)


def make_tables(transaction: Connection, *, database: str) -> None:
    """Creates what is missing, in a transaction that nobody else can write during on SQLite; elsewhere it is locked.

    Raises:
        ConfigError: the database was made by a newer program.
    """
    if transaction.dialect.name == "postgresql":
        transaction.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SCHEMA_LOCK})
    found = version_of(transaction)
    if found is not None and found > SCHEMA_VERSION:
        raise ConfigError(
            f"store: {database} has tables of version {found}, this program knows up to {SCHEMA_VERSION}; "
            "update the program, or give it a database of its own"
        )
    metadata.create_all(transaction)
    if found is None:
        transaction.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        logger.info("store: %s is new: tables of version %d were made", database, SCHEMA_VERSION)
        return
    for version in range(found + 1, SCHEMA_VERSION + 1):
        for statement in _MIGRATIONS[version]:
            transaction.execute(text(statement))
        transaction.execute(schema_version.update().values(version=version))
        logger.info("store: the tables of %s were brought to version %d", database, version)


def version_of(connection: Connection) -> int | None:
    """Of the tables that are there; None where there are none."""
    if not inspect(connection).has_table(schema_version.name):
        return None
    version: int | None = connection.execute(select(schema_version.c.version)).scalar_one_or_none()
    return version
