"""Reads data sets of the Hugging Face hub, or local directories that `datasets` (an extra) can load."""

from grpo_jax.data.rows import Rows


def read_dataset(name: str, *, config: str | None, split: str) -> Rows:
    """Reads the rows of one split of a data set. Data sets of the hub are downloaded once and cached.

    Args:
        name: `owner/name`, or a local directory.
        config: configuration of the data set. None means its only or default one.
        split: name of the split, such as `train`, or `train[:1000]`.

    Yields:
        (place, row), with a place such as "row 3", counted from 1.

    Raises:
        ImportError: `datasets` is missing.
        ValueError: the data set cannot be loaded. The message is one line.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f'data.dataset: {name} needs `datasets`: pip install "grpo-jax[hub]", or give data.train_file '
            f"({error})"
        ) from None
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # it raises many kinds, about names, configurations, splits and the network
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"data.dataset: {name}, split {split!r}, does not load: {type(error).__name__}: {reason}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", dict(row)
