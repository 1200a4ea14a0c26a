"""Checks of the gate on a reply that it has read: sender, weight, form, values, norms."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from corolla.aggregation import robust
from corolla.server.rounds.verdicts import Code, Expected
from corolla.tensors import factors
from corolla.types import Params, Payload
from corolla.wire.messages import Reply, Task

_ABSURD = 1e6
"""No honest change of a factor is as large; one such value would end everybody's training."""

_CANCELS = 1e3
"""How many bounds the factors of a product may span: what cancels comes back as rounding."""

_ROUNDING = 1e-6
"""Of a norm that a client has clipped in float32."""


class RefusedError(Exception):
    """Ends the examination of a reply; never leaves `gate.judge`."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


def check_answers(reply: Reply, client: str, task: Task) -> None:
    """That a reply is of this client, answers this task and tells of no failure."""
    if (reply.run_id, reply.kind, reply.client) != (task.run_id, task.kind, client):
        raise RefusedError(Code.FOREIGN, "reply belongs to another run, task or client")
    if (reply.round, reply.base_version) != (task.round, task.base_version):
        raise RefusedError(
            Code.STALE, f"reply is stale: it answers round {reply.round}, not {task.round}"
        )
    if reply.missing:
        raise RefusedError(Code.MISSING, reply.error or "cached groups are missing")
    if reply.error:
        raise RefusedError(Code.CLIENT_ERROR, reply.error)
    if reply.model_sha256 and task.model_sha256 and reply.model_sha256 != task.model_sha256:
        raise RefusedError(
            Code.FOREIGN,
            f"client has base model {reply.model_sha256[:8]}, not {task.model_sha256[:8]}",
        )


def check_sender(reply: Reply, expect: Expected) -> None:
    """That a gateway answers for as many clients as were asked, and nobody else for others."""
    if (reply.clients > 0, reply.bundle) != (
        expect.most_clients > 0,
        expect.most_clients > 0 and expect.sums is None,
    ):
        raise RefusedError(Code.FORM, _forms(expect))
    if reply.clients > expect.most_clients:
        raise RefusedError(
            Code.WEIGHT, f"reply is of {reply.clients} clients, {expect.most_clients} were asked"
        )


def check_weight(found: int, least: int, most: int) -> None:
    """That a reply has no fewer and no more examples than it can have."""
    if found < least:
        raise RefusedError(Code.WEIGHT, f"reply has {found or 'no'} examples, at least {least}")
    if found > most:
        raise RefusedError(
            Code.WEIGHT, f"reply claims {found} examples, more than it can have: {most}"
        )


def check_update(update: Payload, like: Payload, expect: Expected) -> None:
    """The form, what is given, and the bounds of one client's update."""
    _check_form(update, like)
    for group, params in like.items():
        for name, tensor in params.items():
            found = update[group][name]
            if tensor.dim() == 0 and not _equal(found, tensor):
                raise RefusedError(
                    Code.FORM,
                    f"update has {name} {float(found):g} in {group!r}, not {float(tensor):g}",
                )
            if not tensor.is_floating_point() and not _within(found, tensor):
                raise RefusedError(
                    Code.FORM,
                    f"update tensor {name!r} of {group!r} is not between 0 and {int(tensor.max())}",
                )
    _check_values(update, _ABSURD)
    if expect.max_norm is None:
        return
    norm = math.sqrt(float(robust.squared_norms([update], expect.space)))
    _check_norm(norm, expect.max_norm)
    if expect.space == "products":
        own = update["factors"]
        span = math.fsum(
            float(own[m + factors.A].double().norm() * own[m + factors.B].double().norm())
            for m in factors.modules(own)
        )
        if not span <= _CANCELS * expect.max_norm:
            raise RefusedError(
                Code.NORM, f"factors span {span:.4g} where their product is {norm:.4g}"
            )


def check_sums(sums: Payload, like: Payload, weight: int, expect: Expected) -> None:
    """The form and the bounds of a partial aggregate: |Σ w x| ≤ Σ w · max |x|.

    Groups that an update does not have are statistics, which have no norm of their own.
    """
    came = _who_came(sums, expect.parts) or expect.parts
    groups = frozenset().union(*came) if came else like.keys()
    _check_form(sums, {group: like[group] for group in like if group in groups})
    update = expect.like or {}
    of_one = {
        group: {
            name: tensor.double() / _reach(update.get(group, {})) for name, tensor in own.items()
        }
        for group, own in sums.items()
    }
    _check_values(of_one, weight * _ABSURD)
    if expect.max_norm is not None:
        own = [tensor for group in of_one if group in update for tensor in of_one[group].values()]
        norm = math.sqrt(math.fsum(float(tensor.square().sum()) for tensor in own))
        _check_norm(norm, weight * expect.max_norm)


def check_classes(sums: Payload, reply: Reply, expect: Expected) -> None:
    """The weight by the classes that came: another one may have the larger limit."""
    came = _who_came(sums, expect.parts)
    if came:
        check_weight(reply.num_examples, reply.clients, reply.clients * max(came.values()))
    if expect.tally is None:
        return
    tally = expect.tally(sums)
    counted = sum(clients for _, clients in tally.values())
    if counted != reply.clients:
        raise RefusedError(
            Code.WEIGHT, f"reply is of {reply.clients} clients, its sums of {counted:g}"
        )
    for groups, most in came.items():
        for group in groups & tally.keys():
            examples, clients = tally[group]
            if not examples <= clients * most:
                raise RefusedError(
                    Code.WEIGHT,
                    f"{clients:g} clients with {group!r} claim {examples:g} examples, more than "
                    f"they can have: {clients * most:g}",
                )


def _who_came(sums: Payload, parts: Mapping[frozenset[str], int]) -> Mapping[frozenset[str], int]:
    """The parts of the classes whose groups are all there."""
    return {groups: most for groups, most in parts.items() if groups <= sums.keys()}


def _reach(params: Params) -> float:
    """How much larger a move along directions can be than the scalars g (T,) that it is made of.

    |step Σ_t g_t e_{k_t}| ≤ |step| √T |g|, reached where all are along one direction.
    """
    if "step" not in params or "scalars" not in params:
        return 1.0
    return max(abs(float(params["step"])), 1e-30) * math.sqrt(max(1, len(params["scalars"])))


def _check_form(payload: Payload, like: Payload) -> None:
    if payload.keys() != like.keys():
        raise RefusedError(
            Code.FORM, f"update has groups {sorted(payload)[:9]}, expected {sorted(like)}"
        )
    for group, params in like.items():
        found: Mapping[str, Tensor] = payload[group]
        if found.keys() != params.keys():
            odd = sorted(found.keys() ^ params.keys())
            raise RefusedError(
                Code.FORM, f"update differs in {len(odd)} tensors of {group!r}, first {odd[0]!r}"
            )
        for name, tensor in params.items():
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise RefusedError(
                    Code.FORM,
                    f"update tensor {name!r} is {found[name].dtype} {tuple(found[name].shape)}, "
                    f"expected {tensor.dtype} {tuple(tensor.shape)}",
                )


def _check_values(payload: Payload, most: float) -> None:
    for group, params in payload.items():
        for tensor in params.values():
            if not tensor.is_floating_point():
                continue
            if not bool(torch.isfinite(tensor).all()):
                raise RefusedError(
                    Code.NOT_FINITE, f"update has values in {group!r} that are not finite"
                )
            if bool((tensor.abs() > most).any()):
                raise RefusedError(Code.NORM, f"update has values in {group!r} beyond {most:.0e}")


def _check_norm(norm: float, most: float) -> None:
    if not norm <= most * (1 + _ROUNDING):
        raise RefusedError(Code.NORM, f"update has norm {norm:.4g}, at most {most:.4g}")


def _forms(expect: Expected) -> str:
    if not expect.most_clients:
        return "reply is that of a gateway, which this client is not"
    return "gateway sent no " + ("bundle" if expect.sums is None else "partial aggregate")


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """Exactly; a real number up to what another machine's rounding may change."""
    tolerance = 1e-5 * abs(float(wanted)) if wanted.is_floating_point() else 0.0
    return abs(float(found) - float(wanted)) <= tolerance  # never for NaN


def _within(found: Tensor, limits: Tensor) -> bool:
    return bool(((found >= 0) & (found <= limits)).all())
