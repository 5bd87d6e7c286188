"""What counts comes first, and nothing is wider than the terminal."""

import doctest

import pytest

from grpo_jax.screen import lines

TEXT = (
    "grpo on packaged:arithmetic (0.4 M parameters, float32)\n"
    "  32 prompts × 8 completions = 256 per update, 300 updates = 1.27 epochs of 7,588 prompts\n"
    "step 0/300  evaluation: greedy_accuracy 0.57  mean@4 0.4585  pass@4 0.7  mean_length 2.9"
)


def test_examples():
    assert doctest.testmod(lines).failed == 0 and doctest.testmod(lines).attempted >= 3


@pytest.mark.parametrize("width", [40, 60, 100])
def test_every_line_fits_and_no_word_is_lost(width):
    wrapped = lines.wrap_text(TEXT, width)
    assert max(map(len, wrapped.split("\n"))) <= width
    assert wrapped.split() == TEXT.split()


def test_what_fits_stays_as_it_is():
    assert lines.wrap_text(TEXT, 200) == TEXT


def test_a_command_and_a_path_stay_in_one_piece():
    command = "wandb sync " + "/a directory/run " * 9
    assert command in lines.wrap_text(f"wandb: offline. Upload it with: {command}", 60)
    assert command in lines.wrap_text(command, 60)
    assert "x" * 99 in lines.wrap_text("saved " + "x" * 99, 60)


def test_items_that_do_not_fit_are_left_out_from_the_right():
    items = ["step 1/9", "reward 0.5", "kl 0.01"]
    assert lines.fit_items(items, 80) == "step 1/9  reward 0.5  kl 0.01"
    assert lines.fit_items(items, 28) == "step 1/9  reward 0.5"
    assert lines.fit_items(items, 4) == "step"
