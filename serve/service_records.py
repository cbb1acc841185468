"""What gateways and replicas know of each other through the job database: who serves, who keeps house, whom to tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import bindparam, delete, or_, select, update

from serve.database import Database, insert_of, now_of
from serve.job_records import Webhook
from serve.job_tables import leases, replicas, webhooks

REPLICA_LASTS_S = 30.0
"""A replica that has not reported itself for so long is not counted any more."""
_FORGOTTEN_AFTER_S = 3600.0
_SERVING = select(replicas.c.info).where(replicas.c.reported_at >= bindparam("since_")).order_by(replicas.c.owner)


class ServiceRecords(Database):
    """Replicas, leases and webhooks."""

    def report_replica(self, owner: str, info: Mapping[str, Any]) -> None:
        """`owner` serves, and tells about itself. Reported again at least every few seconds."""
        with self._writing() as transaction:
            now_s = now_of(transaction)
            statement = insert_of(transaction)(replicas).values(owner=owner, info=dict(info), reported_at=now_s)
            told = {"info": statement.excluded.info, "reported_at": now_s}
            transaction.execute(statement.on_conflict_do_update(index_elements=[replicas.c.owner], set_=told))
            transaction.execute(delete(replicas).where(replicas.c.reported_at < now_s - _FORGOTTEN_AFTER_S))

    def replicas(self, now_s: float | None = None) -> list[dict[str, Any]]:
        """What the replicas that serve now tell about themselves, in an order that lasts."""
        with self._reading() as transaction:
            since = (now_of(transaction) if now_s is None else now_s) - REPLICA_LASTS_S
            return [dict(info) for info in transaction.execute(_SERVING, {"since_": since}).scalars()]

    def withdraw_replica(self, owner: str) -> None:
        """`owner` serves no longer."""
        with self._writing() as transaction:
            transaction.execute(delete(replicas).where(replicas.c.owner == owner))

    def take_lease(self, name: str, owner: str, lease_s: float) -> bool:
        """Whether `owner` has the lease for the next `lease_s` seconds; one at a time has it, and may renew it."""
        with self._writing() as transaction:
            now_s = now_of(transaction)
            statement = insert_of(transaction)(leases).values(name=name, owner=owner, lease_until=now_s + lease_s)
            taken = statement.on_conflict_do_update(
                index_elements=[leases.c.name],
                set_={"owner": statement.excluded.owner, "lease_until": statement.excluded.lease_until},
                where=or_(leases.c.owner == owner, leases.c.lease_until < now_s),
            )
            return transaction.execute(taken.returning(leases.c.owner)).one_or_none() is not None

    def due_webhooks(self, owner: str, lease_s: float, limit: int) -> list[Webhook]:
        """Up to `limit` webhooks to be sent now, the oldest first; for `lease_s` seconds nobody else gets them."""
        due = select(webhooks.c.id).order_by(webhooks.c.due_at, webhooks.c.id).limit(limit)
        with self._reading() as transaction:
            if transaction.execute(due.where(webhooks.c.due_at <= now_of(transaction))).first() is None:
                return []
        with self._writing() as transaction:
            now_s = now_of(transaction)
            ours = due.where(webhooks.c.due_at <= now_s).with_for_update(skip_locked=True)
            ids = transaction.execute(ours).scalars().all()
            values = {"attempt": webhooks.c.attempt + 1, "due_at": now_s + lease_s, "owner": owner}
            statement = update(webhooks).where(webhooks.c.id.in_(ids)).values(values).returning(*webhooks.c)
            found = {row.id: row for row in transaction.execute(statement)}
        return [Webhook(id_, found[id_].job_id, found[id_].url, found[id_].attempt) for id_ in ids]

    def webhook_done(self, webhook_id: str) -> None:
        """It was heard."""
        self.webhook_failed(webhook_id, None)

    def webhook_failed(self, webhook_id: str, retry_at: float | None) -> None:
        """It was not heard, and is sent again at `retry_at` (seconds since the epoch); never where that is None."""
        one = webhooks.c.id == webhook_id
        with self._writing() as transaction:
            if retry_at is None:
                transaction.execute(delete(webhooks).where(one))
            else:
                transaction.execute(update(webhooks).where(one).values(due_at=retry_at))
