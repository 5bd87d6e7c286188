"""What a user says: the records of the YAML file.

The names below can be imported from here. Each loads its module when it is asked for.
"""

from grpo_jax.lazy_names import lazy_names

_MODULES = {
    "CheckpointConfig": "run",
    "Config": "run",
    "EvaluationConfig": "run",
    "LoraConfig": "model",
    "ModelConfig": "model",
    "RewardConfig": "run",
    "TrackingConfig": "run",
    "TrainingConfig": "run",
    "AlgorithmConfig": "algorithm",
    "DataConfig": "data",
    "SamplingConfig": "sampling",
}
__getattr__, __all__ = lazy_names(__name__, _MODULES)
