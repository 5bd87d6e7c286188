"""Lets imports by old names work until version 0.2: `grpo_jax.losses` finds `grpo_jax.objective.losses`.

All modules were in one folder before. Scripts and notebooks of that time still work, with a
DeprecationWarning that names the new module. Python asks this finder last, so it never hides a module.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings

# old name -> new name, both below `grpo_jax`
MOVED = {
    "actor": "training.actor",
    "adapters": "models.peft",
    "advantages": "objective.advantages",
    "algorithm_config": "config.algorithm",
    "architectures": "models.decoder_families",
    "attention": "policy.attention",
    "best": "run.best_model",
    "categories": "evaluation.categories",
    "data_config": "config.data",
    "decoder": "policy.decoder",
    "decoder_cache": "policy.cache",
    "decoding": "policy.decoding",
    "estimates": "evaluation.statistics",
    "experience": "training.experience",
    "expressions": "rewards.expressions",
    "families": "models.flax_families",
    "groups": "training.dynamic_sampling",
    "http_scores": "rewards.http_endpoint",
    "hub_data": "data.hub",
    "huge_pages": "cpu_tuning",
    "implementations": "models.implementations",
    "kl": "objective.kl",
    "learner": "training.learner",
    "log_probs": "policy.log_probs",
    "lora": "policy.lora",
    "losses": "objective.losses",
    "metrics": "training.metrics",
    "model_card": "run.model_card",
    "notices": "run.diagnostics",
    "optimizers": "training.optimizers",
    "outcomes": "evaluation.outcomes",
    "packing": "policy.packing",
    "parts": "run.build",
    "progress": "run.progress",
    "prompt_lengths": "data.prompt_lengths",
    "prompts": "data.prompts",
    "recipes": "objective.recipes",
    "reward_functions": "rewards.builtin",
    "reward_models": "rewards.classifier",
    "reward_pool": "rewards.pool",
    "reward_sources": "named_objects",
    "reward_worker": "rewards.worker",
    "rotary": "policy.rotary",
    "row_files": "data.rows",
    "runs": "run.directory",
    "sampling": "policy.sampling",
    "shaping": "objective.shaping",
    "sources": "models.directories",
    "stored_leaves": "checkpoints.format",
    "surrogates": "objective.surrogates",
    "tasks": "data.tasks",
    "verifiers": "rewards.answers.extraction",
    "verl_scores": "rewards.verl",
    "vocabulary": "models.vocabulary",
    "weights": "models.tensor_files",
}


# old name of a public function -> its new name
RENAMED = {"draw": "sample_token"}


def new_name(name: str) -> str:
    """Returns the name that a public function has now, with a warning if it has another one.

    It is for the `__getattr__` of a module, whose caller gets the warning.
    """
    if name not in RENAMED:
        return name
    warnings.warn(f"grpo_jax.{name} is grpo_jax.{RENAMED[name]} now", DeprecationWarning, stacklevel=3)
    return RENAMED[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name and gives the module itself, not a copy of it."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package != "grpo_jax" or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec):
        new = f"grpo_jax.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__  # Python is about to replace it by `spec`
        return module

    def exec_module(self, module):
        # The module has run under its own name already.
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Lets imports by old names find the modules. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
