"""How many bytes there are, as people read it: powers of 1000."""


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def size(count: float) -> str:
    """In the unit that leaves few digits."""
    return megabytes(count) if count < 1e8 else f"{count / 1e6:.0f} MB" if count < 1e9 else gigabytes(count)
