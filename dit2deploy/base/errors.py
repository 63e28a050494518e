"""The two kinds of error a user meets: bad input, and a contract that failed."""


class Dit2DeployError(Exception):
    """One cause and one cure; the command line prints both and no traceback."""

    exit_code = 1

    def __init__(self, cause: str, cure: str = "") -> None:
        super().__init__(f"{cause}\n{cure}" if cure else cause)
        self.cause = cause
        self.cure = cure

    def __reduce__(self):
        return type(self), (self.cause, self.cure)


class Misuse(Dit2DeployError):
    """Usage or input that cannot be served: exit code 2."""

    exit_code = 2


class Failed(Dit2DeployError):
    """A contract that was not met (parity below its threshold, a build that failed): exit code 1."""
