"""The error of a reward that comes from a server."""


class EndpointError(RuntimeError):
    """The endpoint gave no scores, and no row of the batch is the reason."""
