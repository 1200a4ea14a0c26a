"""A round until it commits: who is online, who has joined, another cohort when one fails."""

import time
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from corolla.errors import ConfigError, RoundError, StoppedError
from corolla.host import logs
from corolla.server.rounds.call import Plan, RoundCall, RoundEvents
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.verdicts import Verdict
from corolla.server.runs.checkpoint import Checkpoint
from corolla.server.runs.journal import Entry, Journal, fail_point, past, read
from corolla.server.runs.observer import Observer

_POLL = 1.0
"""Seconds between looks at who is online."""

_BACK = 60.0
"""Seconds that members of a journalled cohort get to come back after their server did."""

_log = logs.logger("run")


@dataclass(frozen=True)
class Done:
    """A round that can be committed, and the federation with those that have joined."""

    federation: Federation
    attempt: int
    result: RoundResult
    seconds: float
    """Of the attempt that succeeded."""


@dataclass(frozen=True)
class Attempts:
    """How rounds of one run are tried. Everything is in the journal before it is done."""

    network: Network
    observer: Observer
    journal: Journal
    own_devices: bool
    spending: Spending
    left_out: set[str] = field(default_factory=set)
    """Members that the run cannot take; each is said once a round."""
    drawn: dict[int, Mapping[str, int]] = field(default_factory=dict)
    """Round → the cohort of its last attempt in this process."""

    def round(self, federation: Federation, at: Checkpoint) -> Done:
        """The round after `at`: when it is abandoned, again with another cohort, so many times.

        A round that was under way when the process before this one ended goes on with the cohort
        and the attempt of then, and so ends in the same bits (the noise of differential privacy
        apart, which no seed decides). What is drawn by secret chance is drawn once a round: it is
        the cohort of all attempts, or chance would be what somebody chose.

        Raises RoundError when the last attempt is abandoned, StoppedError when too few are online
        for too long.
        """
        round, past, config = at.round + 1, self.journal.past, federation.config
        first = attempt = past.attempt(round)
        secret = self.spending.poisson
        while True:
            last = attempt + 1 >= first + config.attempts
            # Buffered updates are simulated: the same clients are drawn again from the seed.
            again = attempt == first and not config.buffer
            plan = past.plan(round) if again else None
            federation, online = self._gather(federation, round, plan)
            began = time.monotonic()
            try:
                with logs.bind(round=round):
                    result = self._ask(federation, at, attempt, plan, online, last)
            except RoundError as error:
                self._note_verdicts(round, attempt, error.verdicts)
                self.journal.append("abandoned", round=round, attempt=attempt, why=str(error))
                attempt += 1
                left = not last and (secret or not _diverged(error.verdicts))
                if left and not self.spending.ended(federation, round):
                    self._warn(f"{error}; it is tried again")
                    continue
                many = attempt - first > 1
                tries = f"; given up after {attempt - first} attempts" if many else ""
                kept = how_to_go_on(self.journal.path.parent)
                raise RoundError(f"{error}{tries}{kept}") from error
            self._note_verdicts(round, attempt, result.verdicts)
            return Done(federation, attempt, result, time.monotonic() - began)

    def _ask(
        self,
        federation: Federation,
        at: Checkpoint,
        attempt: int,
        plan: Entry | None,
        online: int,
        last: bool,
    ) -> RoundResult:
        """Ask the cohort of `plan`, else a new one that is in the journal before it is asked."""
        round = at.round + 1
        cohort: Mapping[str, int] | None = plan["cohort"] if plan else None
        if self.spending.poisson:
            cohort = self._drawn(round)

        def planned(new: Plan) -> None:
            if plan is None:
                away: dict[str, Any] = {}
                if self.spending.poisson:  # nobody waits for those when the round is resumed
                    away = {"away": sorted(new.cohort.keys() - self.network.online())}
                self.journal.append("planned", **asdict(new), online=online, **away)
                self.spending.asked.update(new.cohort.keys())
                self.drawn[round] = new.cohort
            fail_point("planned", round)

        def replied(client: str) -> None:
            if not self.spending.poisson:  # how many are asked is a secret then
                self.observer.replied(client)
            fail_point("waiting", round)

        def noted(event: Mapping[str, Any]) -> None:
            self.journal.append("privacy", round=round, attempt=attempt, **event)
            fail_point("privacy", round)

        waits = federation.config.buffer if round > 1 else None
        self.observer.round_started(round, waits or federation.cohort_size)
        return run_round(
            RoundCall(federation, at.state, at.held, round, at.memory, attempt, cohort, last),
            self.network,
            self.spending,
            RoundEvents(replied, planned, noted),
        )

    def _drawn(self, round: int) -> Mapping[str, int] | None:
        """The cohort of the attempt before this one, also if that was of another process."""
        before = self.journal.past.plans.get(round)
        return self.drawn.get(round, before["cohort"] if before else None)

    def _gather(
        self, federation: Federation, round: int, plan: Entry | None
    ) -> tuple[Federation, int]:
        """Wait until enough members are online: the federation with new ones, how many are there.

        Those of a cohort that has been asked before get time to come back.
        """
        began, paused, config = time.monotonic(), False, federation.config
        able = "clients" if config.dp == "none" else "clients that may take part"
        while True:
            online = self.network.online()
            federation = self._joined(federation, online)
            needed = federation.quorum(self._wanted(federation, round))
            here = self._room(federation, round, federation.present(round, online))
            waited = time.monotonic() - began
            gone = plan["cohort"].keys() - online - set(plan.get("away", ())) if plan else ()
            back = not gone or waited > _BACK
            if here >= needed and back:
                return federation, here
            if here < needed and waited >= config.wait:
                raise StoppedError(
                    f"round {round}: {here} {able} are online, {needed} are needed, for "
                    f"{waited:.0f} seconds"
                )
            if here < needed and not paused:
                self.journal.append("paused", round=round, online=here, needed=needed)
                self._warn(f"round {round}: paused, {here} {able} online, {needed} are needed")
                paused = True
            time.sleep(_POLL)

    def _wanted(self, federation: Federation, round: int) -> int:
        """The size of a cohort, were all online that can be; of devices, others may join."""
        if self.own_devices and not federation.trace:
            return federation.config.cohort or federation.cohort_size
        there = self._room(federation, round, federation.present(round))
        return min(federation.cohort_size, there)

    def _room(self, federation: Federation, round: int, members: Iterable[str]) -> int:
        """How many clients these members are, of those that may be asked."""
        return sum(map(federation.room, self.spending.able(federation, members, round)))

    def _joined(self, federation: Federation, online: AbstractSet[str]) -> Federation:
        """With members that are new, after those that are known, and with the seats of now."""
        reported: Mapping[str, int] = {}
        if not online <= federation.clients.keys():
            reported = self.network.clients()
        new = sorted(reported.keys() - federation.clients.keys())
        seats, wider = self.network.seats(), federation
        changed = [m for m, n in seats.items() if m not in new and federation.seats.get(m) != n]
        for member in [*new, *(m for m in changed if m in federation.clients)]:
            clients = {
                **wider.clients,
                member: federation.clients.get(member, reported.get(member, 0)),
            }
            own = {member: seats[member]} if member in seats else {}
            try:
                wider = replace(
                    wider, clients=clients, roster=tuple(clients), seats={**wider.seats, **own}
                )
            except ConfigError as error:  # what one member says does not end the run
                if member not in self.left_out:
                    self._warn(f"left out: {error}")
                self.left_out.add(member)
        roster = {c: n for c, n in wider.clients.items() if c not in federation.clients}
        if roster or wider.seats != federation.seats:
            self.journal.append("joined", roster=roster, seats=wider.seats)
        for member in roster:
            _log.info("joined", client=member)
        return wider

    def _note_verdicts(self, round: int, attempt: int, verdicts: Mapping[str, Verdict]) -> None:
        codes = {client: str(verdict.code) for client, verdict in verdicts.items()}
        why = {client: verdict.why for client, verdict in verdicts.items() if not verdict.accepted}
        self.journal.append("verdicts", round=round, attempt=attempt, verdicts=codes, why=why)
        if self.spending.level:
            return  # which updates are refused, and why, nobody is told
        for client, reason in why.items():
            _log.warning("refused", round=round, client=client, code=codes[client], why=reason)

    def _warn(self, text: str) -> None:
        self.observer.warned(text)
        _log.warning(text)


def _diverged(verdicts: Mapping[str, Verdict]) -> bool:
    """Returns whether all failed clients say that the learning rate is too high, as others will."""
    whys = [verdict.why for verdict in verdicts.values() if not verdict.accepted]
    return bool(whys) and all("lower lr" in why for why in whys)


def how_to_go_on(folder: Path) -> str:
    """The end of a line that says why a run has stopped."""
    kept = past(read(folder)).round
    if not kept:
        return "; no round was complete: nothing is kept"
    return f"; round {kept} is kept: go on with --resume --out {folder}"
