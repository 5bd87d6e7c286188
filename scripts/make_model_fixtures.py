"""Writes the tiny checkpoints and PyTorch reference logits under tests/fixtures/models.

    python scripts/make_model_fixtures.py NAME ...     # write these fixtures; all without a name
    python scripts/make_model_fixtures.py check DIR    # does PyTorch agree on the exports in DIR/<fixture>?

Needs an environment of its own, as nothing else here needs torch:

    pip install torch "transformers>=4.57,<5" safetensors

A fixture is a directory that PyTorch transformers wrote (random weights, biases and norms included, so that
nothing hides behind a zero) plus reference.npz: token rows and the logits of each row *alone*, without
padding, in float32.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    XGLMConfig,
)

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "models"
VOCAB = 288
LENGTHS = (3, 7, 12, 1)  # of the reference rows; attention windows are 4
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
ROPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, n_inner=24, **COMMON),
    "gpt2_untied": GPT2Config(
        n_layer=1, n_embd=8, n_head=2, n_positions=32, tie_word_embeddings=False, **COMMON
    ),
    "gpt_neo": GPTNeoConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        max_position_embeddings=32,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
        **COMMON,
    ),
    "gptj": GPTJConfig(n_layer=2, n_embd=16, n_head=2, n_positions=32, rotary_dim=4, **COMMON),
    "opt": OPTConfig(
        num_hidden_layers=2,
        hidden_size=16,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        **COMMON | {"pad_token_id": 1},
    ),
    "opt_post_norm": OPTConfig(
        num_hidden_layers=2,
        hidden_size=16,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=8,
        do_layer_norm_before=False,
        **COMMON | {"pad_token_id": 1},
    ),
    "bloom": BloomConfig(n_layer=2, hidden_size=16, n_head=4, **COMMON),
    "xglm": XGLMConfig(
        num_layers=2,
        d_model=16,
        ffn_dim=24,
        attention_heads=2,
        max_position_embeddings=32,
        **COMMON | {"pad_token_id": 1},
    ),
    "gemma": GemmaConfig(**ROPE | {"head_dim": 8, "num_key_value_heads": 1}, **COMMON),
    "llama": LlamaConfig(**ROPE, attention_bias=True, tie_word_embeddings=False, **COMMON),
    "mistral": MistralConfig(**ROPE, sliding_window=None, tie_word_embeddings=False, **COMMON),
}
# What no Flax class computes; saved in bfloat16, as such models are published.
BFLOAT16_CONFIGS = {
    # Of this one's six frequencies the scaling keeps the first, blends the second and divides the rest.
    "llama3": LlamaConfig(
        **ROPE | {"head_dim": 12, "max_position_embeddings": 512},
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        tie_word_embeddings=True,
        **COMMON,
    ),
    "llama_linear": LlamaConfig(
        **ROPE,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        **COMMON,
    ),
    "smollm2": LlamaConfig(**ROPE, rope_theta=100000.0, tie_word_embeddings=True, **COMMON),
    "mistral_window": MistralConfig(**ROPE, sliding_window=4, tie_word_embeddings=False, **COMMON),
    "qwen2": Qwen2Config(
        **ROPE, rope_theta=1e6, use_sliding_window=True, sliding_window=4, max_window_layers=1, **COMMON
    ),
    "qwen3": Qwen3Config(**ROPE | {"head_dim": 8}, rope_theta=1e6, tie_word_embeddings=True, **COMMON),
    "gemma2": Gemma2Config(
        **ROPE | {"head_dim": 8},
        sliding_window=4,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **COMMON,
    ),
    "gemma3_text": Gemma3TextConfig(
        **ROPE | {"head_dim": 8, "num_hidden_layers": 3},
        sliding_window=4,
        sliding_window_pattern=3,
        query_pre_attn_scalar=6,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **COMMON,
    ),
}


def make_tokenizer(*, add_bos: bool) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of VOCAB tokens; id 0 is <|endoftext|>, 1 and 2 the chat markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["the model answers the question", "one and one is two", "what is the answer"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    if add_bos:
        fast.chat_template = CHAT
    return fast


def reference(model: torch.nn.Module, rows: list[list[int]]) -> np.ndarray:
    """Returns the logits of every row, run alone, stacked over rows: [sum of lengths, V]."""
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([row])).logits[0].numpy() for row in rows])


def write(names: list[str]) -> None:
    """Writes the named fixtures."""
    rows = [np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in LENGTHS]
    for name in names:
        config = CONFIGS.get(name) or BFLOAT16_CONFIGS[name]
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter_name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and not parameter_name.endswith("bias")
            around = 1.0 if norm and not config.model_type.startswith("gemma") else 0.0
            torch.nn.init.normal_(parameter, mean=around, std=0.2)
            if name in BFLOAT16_CONFIGS:
                parameter.data = parameter.data.bfloat16().float()
        directory = FIXTURES / name
        (copy.deepcopy(model).bfloat16() if name in BFLOAT16_CONFIGS else model).save_pretrained(directory)
        make_tokenizer(add_bos=name == "llama").save_pretrained(directory)
        for file in directory.glob("*.json"):  # indentation is half of these files
            file.write_text(
                json.dumps(json.loads(file.read_text()), separators=(",", ":"), sort_keys=True) + "\n"
            )
        np.savez_compressed(
            directory / "reference.npz",
            tokens=np.concatenate(rows).astype(np.int32),
            lengths=np.array(LENGTHS),
            logits=reference(model, rows),
        )
        print(f"{name}: {sum(f.stat().st_size for f in directory.iterdir()):,} bytes")


def check(exports: Path) -> None:
    """Opens exported directories with PyTorch and compares their logits with the references."""
    for directory in sorted(path for path in exports.iterdir() if (FIXTURES / path.name).is_dir()):
        fixture = np.load(FIXTURES / directory.name / "reference.npz")
        rows = np.split(fixture["tokens"], np.cumsum(fixture["lengths"])[:-1])
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager"
        )
        difference = np.abs(reference(model.eval(), [row.tolist() for row in rows]) - fixture["logits"]).max()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        print(f"{directory.name}: {type(model).__name__} {difference:.1e} {len(tokenizer)} tokens", info)


if __name__ == "__main__":
    arguments = sys.argv[1:] or [*CONFIGS, *BFLOAT16_CONFIGS]
    check(Path(arguments[1])) if arguments[0] == "check" else write(arguments)
