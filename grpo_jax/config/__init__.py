"""What a user says: the records of the YAML file.

The names below can be imported from here. Each loads its module when it is asked for.
"""

import importlib

_PUBLIC = {
    "CheckpointConfig": "run",
    "Config": "run",
    "EvaluationConfig": "run",
    "LoraConfig": "run",
    "ModelConfig": "run",
    "RewardConfig": "run",
    "TrackingConfig": "run",
    "TrainingConfig": "run",
    "AlgorithmConfig": "algorithm",
    "DataConfig": "data",
    "SamplingConfig": "sampling",
}  # name -> the module of this room that has it
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
