"""Comparing token sequences under the margin rule."""

MARGIN = 1e-3


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    return next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)


def differs_within_margin(ours: list[int], theirs: list[int], margins: list[float]) -> bool:
    """False when equal; True when they part where the top two candidates are closer than MARGIN; fails otherwise.

    After a legitimate parting the texts are of different histories and say nothing more.
    """
    at = first_difference(ours, theirs)
    if at is None:
        return False
    assert margins[at] < MARGIN, f"token {at}: {ours[at]} instead of {theirs[at]} at a margin of {margins[at]}"
    return True
