"""What jsonargparse says about a config, in our words."""

import re
from collections.abc import Collection

from grpo_jax.config.other_words import say_unknown

# How jsonargparse says that a key is unknown, on the command line, in a section, at the top, in a list item.
_UNKNOWN = (
    (r"Unrecognized arguments: --([\w.]+)", ""),
    (r"Key ['\"]?([\w.]+)['\"]? is not expected", ""),
    (r"Group '(?P<section>[\w.]+)' does not accept option '([\w.]+)'", "section"),
    (r"Parser key \"(?P<section>[\w.]+)\": .*Option '([\w.]+)' is not accepted", "section"),
    (r"Option '([\w.]+)' is not accepted", ""),
)


# How jsonargparse says other things, and how we do. An optional value is a union of its type and null.
_PLAIN = (
    (r'^Parser key "config":\s*', "--config: "),
    (r'^Parser key "([\w.]+)":\s*', r"\1: "),
    (r"^Unexpected config: *(.*)", r"--config: expected keys and values, got '\1'"),
    (r"^Problems parsing config", "--config: not YAML"),
    (r" in \"<unicode string>\",", ","),
    (
        r"^(\w*\.?eos_token_ids): Does not validate .* Given value: (.*)",
        r"\1: expected ids or texts of tokens, such as [2, </s>]. Got value: \2",
    ),
    (
        r"^(\w*\.?stop): Does not validate .* Given value: (.*)",
        r"\1: expected a text or a list of texts, such as [</answer>]. Got value: \2",
    ),
    (
        r"Does not validate against any of the Union subtypes Subtypes: .* Errors: - (.*?) "
        r"- Expected a <class 'NoneType'> Given value type: .* Given value: (.*)",
        r"\1 or null. Got value: \2",
    ),
    (r"a typing\.Literal", "one of "),
    (r"[Ee]xpected a <class '(\w+)'>", r"expected a value of type \1"),
)


def explain(message: str, keys: Collection[str]) -> str:
    """Shortens a message of jsonargparse to one line, and names the key that was probably meant."""
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    for pattern, section in _UNKNOWN:
        if found := re.search(pattern, message, re.IGNORECASE):
            key = found[found.re.groups]
            if section:
                key = f"{found['section']}.{key}"
            return say_unknown(key, keys)
    for pattern, plain in _PLAIN:
        message = re.sub(pattern, plain, message)
    return message
