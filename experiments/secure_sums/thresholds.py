"""Prints the thresholds of secure sums of 3 to 250 members, as in docs/secure-sums.md.

python experiments/secure_sums/thresholds.py
"""

from corolla.sums import thresholds

SIZES = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 75, 100, 150, 200, 250)
AWAY = (20, 50, 100, 200)
"""Sizes that are also shown with as many missing as a floor of a tenth allows."""


def main() -> None:
    """Print the table."""
    print("| L | c | e | needed: L - e | floor, same for all | floor F | lost at 10 % | at 30 % |")
    print("|---|---|---|---|---|---|---|---|")
    for members in SIZES:
        show(members, 1)
    for members in AWAY:
        show(members, max(5, members // 10), "*", members)


def show(members: int, smallest: int, mark: str = "", most: int = 0) -> None:
    """Print a row: the largest e with this floor, of at most a third of the members or `most`."""
    corrupt = thresholds.default_corrupt(members)
    able = range((most or members // 3) + 1)
    missing = max(e for e in able if thresholds.floor(members, corrupt, e) >= smallest)
    cells = [
        f"{mark}{members}{mark}",
        corrupt,
        missing,
        members - missing,
        thresholds.same_answers_floor(members, corrupt, missing),
        thresholds.floor(members, corrupt, missing),
        f"{thresholds.lost(members, missing, 0.1):.2g}",
        f"{thresholds.lost(members, missing, 0.3):.2g}",
    ]
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
