"""Errors of the libraries we stand on, told within our own."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to be part of our own sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")
