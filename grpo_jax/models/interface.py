"""What the package asks of a module that computes models. There are two, see `implementations`."""

from collections.abc import Iterator
from typing import Any, Protocol

from grpo_jax.types import Params, Policy

HFConfig = Any  # a configuration object of transformers, with the fields of its model type
Problems = Iterator[str]  # reasons why a configuration is refused


class Implementation(Protocol):
    """A module that turns a configuration of transformers into a `Policy`.

    Except for `problems`, its functions take configurations without problems. Both implementations have the
    same parameters for the same configuration, so files and checkpoints do not depend on the choice.
    """

    def problems(self, config: HFConfig) -> Problems:
        """Yields every reason why the implementation would not compute what PyTorch computes."""

    def param_shapes(self, config: HFConfig) -> Params:
        """Returns the pytree of the parameters, as shapes."""

    def embedding_path(self, config: HFConfig) -> tuple[str, ...]:
        """Returns the path of the token embedding. Its first part is the base model's."""

    def buffers(self, config: HFConfig) -> tuple[str, ...]:
        """Returns patterns of tensors in PyTorch files that are constants, not parameters."""

    def max_positions(self, config: HFConfig) -> int | None:
        """Returns the longest length (padding included) that is computed correctly, None without limit."""

    def make_policy(
        self, config: HFConfig, *, dtype: Any, remat: str = "none", attention: str = "shared"
    ) -> Policy:
        """Makes the policy of a configuration.

        Args:
            config: configuration object of transformers.
            dtype: compute dtype, jnp.float32 or jnp.bfloat16. Logits are float32 either way.
            remat: what a layer's backward pass recomputes, see `make_decoder`.
            attention: implementation of attention, see `make_decoder`.

        Raises:
            ValueError: the implementation has no such remat or attention.
        """
