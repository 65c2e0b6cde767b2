"""Numbers as people read them."""


def counted(number: float, noun: str) -> str:
    """A number of things: ``1 trial``, ``2 trials``.

    Args:
        number: How many.
        noun: One of them; its plural takes an s.
    """
    told = f"{number:g}" if isinstance(number, float) else f"{number}"
    return f"{told} {noun}{'' if number == 1 else 's'}"
