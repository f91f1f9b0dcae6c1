"""peft."""


def register() -> None:
    """Nothing yet."""
