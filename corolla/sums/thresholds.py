"""Thresholds of secure sums: how many members may be lost, and the floor under what is learned."""

from math import ceil, exp, lgamma, log, log1p

from corolla.errors import SecureSumError

LARGEST = 250
"""Members of one sum at most."""


def floor(members: int, corrupt: int, missing: int) -> int:
    """F = h - ⌊h e / (h - e)⌋ with h = L - c: the fewest honest updates in any sum that is learned.

    It holds against a server that tells each member of another set of answers, with `corrupt`
    members on its side, while `missing` may be lost at each step. 0 where 2 e < L - c does not
    hold: then single updates could be learned.
    """
    honest = members - corrupt
    if honest <= 0 or missing < 0 or 2 * missing >= honest:
        return 0
    return honest - honest * missing // (honest - missing)


def same_answers_floor(members: int, corrupt: int, missing: int) -> int:
    """L - e - c: the fewest honest updates where the server tells all members the same."""
    return members - missing - corrupt


def default_corrupt(roster: int) -> int:
    """A tenth of all members of a roster, at least one."""
    return ceil(roster / 10)


def most_missing(members: int, corrupt: int, smallest: int) -> int:
    """The largest e of at most a third of `members` whose floor is `smallest` or more.

    Raises SecureSumError where not even e = 0 reaches it.
    """
    for missing in range(members // 3, -1, -1):
        if floor(members, corrupt, missing) >= max(smallest, 1):
            return missing
    raise SecureSumError(
        f"{members} members with {corrupt} corrupt give no sum of {smallest} honest updates: ask "
        f"more members, or lower smallest-sum or sum-corrupt"
    )


def told(members: int, corrupt: int, missing: int) -> str:
    """A sentence on what the thresholds mean, for people."""
    side = "a member" if corrupt == 1 else f"{corrupt} members"
    return (
        f"{members} members, of which {missing} may be lost at each step; a server that keeps to "
        f"the protocol opens sums of at least {members - missing} updates, one that lies and has "
        f"{side} on its side sums of at least {floor(members, corrupt, missing)} honest ones"
    )


def check(members: int, corrupt: int, missing: int, smallest: int) -> None:
    """Raises SecureSumError where a sum could hold fewer than `smallest` honest updates."""
    if members > LARGEST:
        raise SecureSumError(f"{members} members, a secure sum has at most {LARGEST}")
    found = floor(members, corrupt, missing)
    if found == 0:
        raise SecureSumError(
            f"{missing} of {members} members may be missing with {corrupt} corrupt: twice as many "
            f"as may be missing must be fewer than {members - corrupt}"
        )
    if found < smallest:
        raise SecureSumError(
            f"a sum of {members} members with {corrupt} corrupt and {missing} missing may hold "
            f"{found} honest updates, fewer than smallest-sum={smallest}"
        )


def lost(members: int, missing: int, rate: float) -> float:
    """The probability that more than `missing` of `members` are lost, each with `rate` alone."""
    return sum(
        exp(_choose(members, k) + k * log(rate) + (members - k) * log1p(-rate))
        for k in range(missing + 1, members + 1)
    )


def _choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
