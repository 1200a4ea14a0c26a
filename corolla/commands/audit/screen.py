"""The terminal view of an audit."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corolla.commands.audit.done import DoneRun
from corolla.commands.audit.run import Audit, Membership
from corolla.privacy.guarantee import Guarantee


def print_audit(console: Console, audit: Audit) -> None:
    """Prints the claim of an audit, what was proven, and what could have been proven."""
    _print_run(console, audit.of)
    _print_claim(console, audit.claimed)
    table = Table("score", "right guesses", "lower bound on epsilon")
    for proof in audit.proofs:
        table.add_row(proof.score, f"{proof.right} of {audit.guesses}", f"{proof.lower_bound:.2f}")
    console.print(table)
    console.print(
        f"{audit.canaries} canary {audit.unit}s, {audit.included} of them in, {audit.rounds} "
        f"rounds; at delta {audit.delta:g} and {audit.confidence:.0%} confidence. With "
        f"{audit.guesses} guesses no lower bound is above {audit.ceiling:.2f}.",
        highlight=False,
        soft_wrap=True,
    )
    verdict = "the claim is not refuted, which does not prove it"
    if audit.claimed is None:
        verdict = "nothing is claimed; the lower bound says how much leaks at least"
    if audit.refuted:
        verdict = "[red]the claim is refuted: more leaks than it says[/]"
    console.print(verdict, highlight=False, soft_wrap=True)


def print_membership(console: Console, membership: Membership) -> None:
    """Both models side by side."""
    _print_run(console, membership.of)
    _print_claim(console, membership.claimed)
    table = Table("trained with", "AUC", "TPR at 1 % FPR", "members", "others", "held-out loss")
    for name, attack in membership.attacks.items():
        table.add_row(
            name,
            f"{attack.auc:.3f}",
            f"{attack.tpr_at_1_fpr:.1%}",
            str(attack.members),
            str(attack.others),
            f"{membership.losses[name]:.4f}",
        )
    console.print(table)
    console.print(
        f"AUC 0.5 and a TPR of 1 % are guessing; the loss of the base model is "
        f"{membership.losses['base']:.4f}. A better attack may find more.",
        highlight=False,
        soft_wrap=True,
    )


def _print_run(console: Console, of: DoneRun | None) -> None:
    if of:
        stated = of.stated or "no differential privacy: epsilon ∞"
        console.print(
            f"run      {escape(str(of.folder))} says: {escape(stated)}",
            highlight=False,
            soft_wrap=True,
        )


def _print_claim(console: Console, claimed: Guarantee | None) -> None:
    said = claimed.line() if claimed else "no differential privacy: epsilon ∞"
    console.print(f"claimed  {escape(said)}", highlight=False, soft_wrap=True)
