"""Decoding: what is sampled, with which noise, and that nothing outside a row has a say in it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_toy import completion_logits, full_logits, softmax
from toy import VOCAB, make_toy_policy

from grpo_jax.policy import decoding
from grpo_jax.policy.decoding import fork, generate, positions_from_mask, prefill, row_keys
from grpo_jax.policy.log_probs import completion_log_probs
from grpo_jax.policy.shapes import decode_stages
from grpo_jax.types import Policy, Prompts, pad_slots, repeat_rows, take_rows

N, S, G, T = 4, 6, 3, 8
B = N * G
EOS = jnp.array([5, 11])  # an array of this shape everywhere: one compilation
NEVER = jnp.array([-1, -1])
KEY = jax.random.key(0)
LENGTHS = (6, 3, 1, 4)


def left_pad(sequences, length: int) -> Prompts:
    tokens, mask = np.zeros((len(sequences), length), np.int32), np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        tokens[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = True
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))


SEQUENCES = [list(np.random.default_rng(n).integers(0, VOCAB, size)) for n, size in enumerate(LENGTHS)]
PROMPTS = left_pad(SEQUENCES, S)


# Given in full on every call: to jit, an argument left out is another signature and another compilation.
SETTINGS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "first_row": 0, "eos_ids": NEVER}


def sample(toy_policy, prompts=PROMPTS, key=KEY, *, group_size=G, max_new_tokens=T, **settings):
    policy, params = toy_policy
    settings = {**SETTINGS, **settings}
    rollout = generate(
        policy, params, prompts, key, group_size=group_size, max_new_tokens=max_new_tokens, **settings
    )
    return jax.device_get(rollout)


def rows(tree, start: int, stop: int):
    return jax.tree.map(lambda x: x[start:stop], tree)


def assert_same_rollout(actual, expected):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    for name in ("log_probs", "kept_mass"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), atol=1e-5, err_msg=name)


# Shapes and records


def test_rollout_has_the_documented_shapes_and_types(toy_policy):
    rollout = sample(toy_policy, eos_ids=EOS)
    chex.assert_shape([rollout.prompt_tokens, rollout.prompt_mask], (B, S))
    chex.assert_shape([rollout.tokens, rollout.mask, rollout.log_probs, rollout.kept_mass], (B, T))
    chex.assert_shape(rollout.finished, (B,))
    chex.assert_type([rollout.tokens, rollout.prompt_tokens], jnp.int32)
    chex.assert_type([rollout.mask, rollout.prompt_mask, rollout.finished], bool)
    chex.assert_type([rollout.log_probs, rollout.kept_mass], jnp.float32)
    np.testing.assert_array_equal(rollout.prompt_tokens, np.repeat(PROMPTS.tokens, G, axis=0))
    np.testing.assert_array_equal(rollout.prompt_mask, np.repeat(PROMPTS.mask, G, axis=0))


@pytest.mark.usefixtures("no_shape_checks")
def test_prompts_of_another_rank_raise(toy_policy):
    with pytest.raises(AssertionError):
        sample(toy_policy, Prompts(tokens=PROMPTS.tokens[0], mask=PROMPTS.mask[0]))


def test_positions_count_real_tokens_only():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    positions = positions_from_mask(mask)
    np.testing.assert_array_equal(positions, expected)
    assert positions.dtype == jnp.int32


def test_fork_repeats_rows_prompt_major():
    forked = fork({"key": jnp.arange(6).reshape(3, 2)}, 2)
    np.testing.assert_array_equal(forked["key"], [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]])


def test_a_plain_cache_is_forked_grown_and_cut_by_rows():
    cache = {"key": jnp.arange(6).reshape(3, 2), "index": jnp.int32(4)}
    forked = repeat_rows(cache, 2)
    np.testing.assert_array_equal(forked["key"], [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]])
    grown = pad_slots(forked, 3)
    np.testing.assert_array_equal(grown["key"][2:4], [[2, 3, 0], [2, 3, 0]])
    np.testing.assert_array_equal(take_rows(grown, jnp.array([5, 0]))["key"], [[4, 5, 0], [0, 1, 0]])
    for each in (forked, grown, take_rows(grown, jnp.array([1]))):
        assert each["index"].shape == () and each["index"] == 4


def test_prefill_fills_a_cache_of_exactly_the_prompts_length(toy_policy):
    policy, params = toy_policy
    hidden, cache = prefill(policy, params, PROMPTS)
    chex.assert_shape(hidden, (N, 16))
    chex.assert_shape(cache["key"], (N, S, 16))
    for row, sequence in enumerate(SEQUENCES):
        np.testing.assert_allclose(
            policy.unembed(params, hidden[row]), full_logits(params, sequence)[-1], rtol=1e-4, atol=1e-4
        )


# A row's noise is its own


def test_fork_equals_no_fork(toy_policy):
    repeated = left_pad([s for s in SEQUENCES for _ in range(G)], S)
    assert_same_rollout(
        sample(toy_policy, eos_ids=EOS), sample(toy_policy, repeated, group_size=1, eos_ids=EOS)
    )


def test_slices_of_the_prompts_give_slices_of_the_rollout(toy_policy):
    whole = sample(toy_policy, eos_ids=EOS)
    for start in range(0, N, 2):
        part = sample(toy_policy, rows(PROMPTS, start, start + 2), first_row=start * G, eos_ids=EOS)
        assert_same_rollout(part, rows(whole, start * G, (start + 2) * G))


def test_a_row_does_not_depend_on_its_neighbours(toy_policy):
    whole = sample(toy_policy, eos_ids=EOS)
    others = left_pad([SEQUENCES[0], [1], [2, 3], [4] * 6], S)
    assert_same_rollout(rows(sample(toy_policy, others, eos_ids=EOS), 0, G), rows(whole, 0, G))


def test_same_key_same_tokens_other_key_other_tokens(toy_policy):
    step_0, step_1 = (jax.random.fold_in(KEY, step) for step in (0, 1))
    first, again, other = (sample(toy_policy, key=key) for key in (step_0, step_0, step_1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not np.any(np.all(first.tokens == other.tokens, axis=1))


def test_rows_of_a_group_and_groups_of_one_prompt_differ(toy_policy):
    same_prompt = left_pad([SEQUENCES[1]] * N, S)
    tokens = np.asarray(sample(toy_policy, same_prompt, temperature=2.0).tokens)
    assert len(np.unique(tokens, axis=0)) == B
    # Slices of a larger batch must not repeat each other's noise either.
    later = np.asarray(sample(toy_policy, same_prompt, temperature=2.0, first_row=B).tokens)
    assert len(np.unique(np.concatenate([tokens, later]), axis=0)) == 2 * B


def test_row_keys_are_distinct_and_depend_on_the_row_number_alone():
    keys = jax.random.key_data(row_keys(KEY, jnp.arange(1000)))
    assert len(np.unique(keys, axis=0)) == 1000
    np.testing.assert_array_equal(keys[300:310], jax.random.key_data(row_keys(KEY, jnp.arange(300, 310))))


def test_left_padding_changes_nothing(toy_policy):
    padded = left_pad(SEQUENCES, S + 7)
    assert_same_rollout(sample(toy_policy, padded, eos_ids=EOS), sample(toy_policy, eos_ids=EOS))


def test_what_stands_in_the_padding_changes_nothing(toy_policy):
    junk = PROMPTS.replace(tokens=jnp.where(PROMPTS.mask, PROMPTS.tokens, 5))
    assert_same_rollout(sample(toy_policy, junk, eos_ids=EOS), sample(toy_policy, eos_ids=EOS))


# The distribution


def test_greedy_equals_a_loop_of_full_forwards(toy_policy):
    rollout = sample(toy_policy, temperature=0.0)
    for row, sequence in enumerate(SEQUENCES):
        sequence = list(sequence)
        for _ in range(T):
            sequence.append(int(np.argmax(full_logits(toy_policy[1], sequence)[-1])))
        for g in range(G):
            np.testing.assert_array_equal(rollout.tokens[row * G + g], sequence[-T:])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_recorded_log_probs_are_teacher_forced_ones(toy_policy, temperature):
    rollout = sample(toy_policy, eos_ids=EOS, temperature=temperature)
    scored, _ = completion_log_probs(*toy_policy, rollout, temperature=temperature)
    np.testing.assert_allclose(rollout.log_probs, scored, atol=1e-5)
    for row in range(B):
        logits = completion_logits(toy_policy[1], rollout, row) / (temperature or 1.0)
        n = len(logits)
        expected = np.log(softmax(logits))[np.arange(n), rollout.tokens[row, :n]]
        np.testing.assert_allclose(rollout.log_probs[row, :n], expected, atol=2e-5)
        assert not np.any(rollout.log_probs[row, n:]) and not np.any(rollout.kept_mass[row, n:])


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9, "min_p": 0.05}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.8, 1.5])
def test_truncation_draws_allowed_tokens_and_scores_the_full_distribution(toy_policy, settings, temperature):
    rollout = sample(toy_policy, temperature=temperature, **settings)
    for row in range(B):
        probs = softmax(completion_logits(toy_policy[1], rollout, row) / temperature)
        for t, p in enumerate(probs):
            token, kept = int(rollout.tokens[row, t]), allowed(p, **settings)
            assert kept[token], (row, t, token)
            np.testing.assert_allclose(rollout.log_probs[row, t], np.log(p[token]), atol=2e-5)
            np.testing.assert_allclose(rollout.kept_mass[row, t], p[kept].sum(), atol=1e-5)


def allowed(probs, *, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Returns which tokens the filters leave, one after the other: bool [V]."""
    order, kept = np.argsort(-probs), np.ones(len(probs), bool)
    if top_k:
        kept[order[top_k:]] = False
    if top_p < 1:
        left, mass = probs * kept / np.sum(probs * kept), 0.0
        for token in order:
            kept[token] &= mass < top_p
            mass += left[token]
    if min_p:
        kept &= probs >= min_p * np.max(probs)
    return kept


def test_kept_mass_is_one_without_truncation(toy_policy):
    rollout = sample(toy_policy, eos_ids=EOS, temperature=1.3)
    np.testing.assert_array_equal(rollout.kept_mass, rollout.mask.astype(np.float32))


def test_first_tokens_follow_the_softmax(toy_policy):
    count, temperature = 4096, 1.5
    prompts = left_pad([SEQUENCES[1]], S)
    rollout = sample(toy_policy, prompts, group_size=count, max_new_tokens=2, temperature=temperature)
    probs = softmax(full_logits(toy_policy[1], SEQUENCES[1])[-1] / temperature)
    frequencies = np.bincount(rollout.tokens[:, 0], minlength=VOCAB) / count
    # Four standard deviations of a binomial share.
    assert np.all(np.abs(frequencies - probs) < 4 * np.sqrt(probs * (1 - probs) / count) + 1e-3)
    # The second token's noise is independent of the first's: condition on the likeliest first token.
    first = int(np.argmax(probs))
    second = np.asarray(rollout.tokens[:, 1])[np.asarray(rollout.tokens[:, 0]) == first]
    probs = softmax(full_logits(toy_policy[1], [*SEQUENCES[1], first])[-1] / temperature)
    frequencies = np.bincount(second, minlength=VOCAB) / len(second)
    assert np.all(np.abs(frequencies - probs) < 4 * np.sqrt(probs * (1 - probs) / len(second)) + 1e-3)


# Endings


def assert_ends_are_right(rollout, eos_ids):
    """Cuts every row by a literal reading of the rule."""
    for row in range(len(rollout.tokens)):
        tokens, length, finished = np.asarray(rollout.tokens[row]), rollout.tokens.shape[1], False
        for t, token in enumerate(tokens):
            if token in eos_ids:
                length, finished = t + 1, True
                break
        np.testing.assert_array_equal(rollout.mask[row], np.arange(len(tokens)) < length)
        assert not np.any(tokens[length:])
        assert not np.any(rollout.log_probs[row, length:])
        assert bool(rollout.finished[row]) == finished


def test_the_first_of_several_eos_ids_ends_a_row_and_is_part_of_it(toy_policy):
    rollout = sample(toy_policy, eos_ids=EOS, temperature=2.0)
    assert_ends_are_right(rollout, EOS.tolist())
    assert 0 < np.sum(rollout.finished) < B  # both kinds of row are there
    last = np.asarray(rollout.tokens)[np.arange(B), np.sum(rollout.mask, axis=1) - 1]
    assert set(last[np.asarray(rollout.finished)]) == {5, 11}
    # Up to its end a row is what it would have been without an end.
    endless = sample(toy_policy, temperature=2.0)
    np.testing.assert_array_equal(rollout.tokens, np.where(rollout.mask, endless.tokens, 0))


def test_an_eos_at_the_last_position_is_finished_and_the_limit_is_not(toy_policy):
    endless = sample(toy_policy, temperature=2.0)
    tokens = np.asarray(endless.tokens)
    # A token that some row draws at the last position for the first time.
    row = next(b for b in range(B) if tokens[b, -1] not in tokens[b, :-1])
    eos = int(tokens[row, -1])
    rollout = sample(toy_policy, temperature=2.0, eos_ids=jnp.array([eos, eos]))
    assert_ends_are_right(rollout, [eos])
    assert np.all(rollout.mask[row]) and rollout.finished[row]
    cut_off = np.all(rollout.mask, axis=1) & ~np.asarray(rollout.finished)
    assert np.any(cut_off)


def test_zero_may_be_an_eos_id(toy_policy):
    # Ended rows are filled with zeros: these must not count as another end.
    rollout = sample(toy_policy, temperature=3.0, eos_ids=jnp.array([0, 5]))
    assert_ends_are_right(rollout, [0, 5])


def test_a_prompt_may_contain_the_eos_id(toy_policy):
    prompts = left_pad([[5, 1, 5], [11], [5, 11, 5], [2, 5]], S)
    rollout = sample(toy_policy, prompts, eos_ids=EOS, temperature=2.0)
    assert_ends_are_right(rollout, EOS.tolist())
    np.testing.assert_array_equal(rollout.prompt_mask, np.repeat(prompts.mask, G, axis=0))
    endless = sample(toy_policy, prompts, temperature=2.0)
    np.testing.assert_array_equal(rollout.tokens, np.where(rollout.mask, endless.tokens, 0))


def test_without_eos_ids_every_row_runs_to_the_limit(toy_policy):
    rollout = sample(toy_policy, eos_ids=jnp.zeros(0, jnp.int32))
    assert np.all(rollout.mask) and not np.any(rollout.finished)


def countdown_policy(vocab: int) -> Policy:
    """Says n-1, n-2, ..., 0 after a prompt that ends in n: with 0 as eos, exactly n tokens."""

    def forward(params, tokens, mask, positions, cache=None):
        return jax.nn.one_hot(tokens - 1, vocab), cache

    return Policy(
        forward=forward,
        unembed=lambda params, hidden: 99.0 * hidden,
        init_cache=lambda batch, length: {"key": jnp.zeros((batch, length)), "index": jnp.int32(0)},
    )


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("limit", [32, 45])
def test_finished_says_who_drew_an_eos_whatever_the_stages(batch, limit):
    assert len(decode_stages(batch, limit)) >= 2
    policy, rng = countdown_policy(2 * limit + 1), np.random.default_rng(batch)
    for share in (0.0, 0.5, 1.0):
        for late in (False, True):  # whether those that end do so in the last places only, or anywhere
            lengths = rng.integers(limit - 1 if late else 1, limit + 1, batch)
            ends = rng.permutation(batch) < round(share * batch)
            prompts = left_pad([[n] for n in np.where(ends, lengths, lengths + limit)], 1)
            rollout = sample(
                (policy, {}),
                prompts,
                group_size=1,
                max_new_tokens=limit,
                temperature=0.0,
                eos_ids=jnp.array([0, 0]),
            )
            np.testing.assert_array_equal(rollout.finished, ends)
            assert_ends_are_right(rollout, [0])


# Cost


def counting(policy: Policy):
    """Returns the policy and two lists: shapes given to forward when tracing, and calls when running."""
    traced, calls = [], []

    def forward(params, tokens, mask, positions, cache=None):
        traced.append((tokens.shape, mask.shape))
        jax.debug.callback(lambda: calls.append(1))
        return policy.forward(params, tokens, mask, positions, cache)

    return policy.replace(forward=forward), traced, calls


@pytest.mark.slow
def test_prompts_are_prefilled_once_and_decoding_stops_with_the_last_row(toy_policy):
    policy, traced, calls = counting(toy_policy[0])

    def forwards(**settings) -> tuple[int, object]:
        calls.clear()
        rollout = sample((policy, toy_policy[1]), **settings)
        jax.effects_barrier()
        return len(calls), rollout

    # T tokens are T forwards: the prefill gives the first, the last token is never run.
    assert forwards()[0] == T
    assert set(traced) == {((N, S), (N, S)), ((B, 1), (B, S + T))}
    ran, rollout = forwards(eos_ids=jnp.arange(2), temperature=3.0)
    assert ran == np.max(np.sum(rollout.mask, axis=1))
    # The greedy token ends every row at once.
    greedy = sample(toy_policy, temperature=0.0)
    one_prompt = left_pad([SEQUENCES[0]] * N, S)
    eos = jnp.array([greedy.tokens[0, 0]] * 2)
    ran, rollout = forwards(prompts=one_prompt, temperature=0.0, eos_ids=eos)
    assert ran == 1
    np.testing.assert_array_equal(np.sum(rollout.mask, axis=1), 1)
    assert np.all(rollout.finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [
        ((B, T), (1, T)),
        ((B, 2), (B, T), (B // 2, T), (2, T)),
        ((B, 1), (B, 3), (B, 4), (B - 1, T), (B - 2, T), (1, T)),
    ],
)
def test_dropping_finished_rows_and_growing_the_cache_change_nothing(toy_policy, monkeypatch, stages):
    policy, traced, calls = counting(toy_policy[0])
    eos = jnp.arange(3)
    whole = sample(toy_policy, eos_ids=eos, temperature=2.0)
    lengths = np.sum(whole.mask, axis=1)
    assert len(set(lengths.tolist())) > 2  # rows end at different times
    monkeypatch.setattr(decoding, "decode_stages", lambda *_: stages)
    shrinking = sample((policy, toy_policy[1]), eos_ids=eos, temperature=2.0)
    jax.effects_barrier()
    assert_same_rollout(shrinking, whole)
    expected = {((size, 1), (size, S + slots)) for size, slots in stages}
    assert {(tokens, mask) for tokens, mask in traced} == {((N, S), (N, S)), *expected}
    assert len(calls) == lengths.max()  # not one forward more


@pytest.mark.slow
def test_new_settings_compile_nothing(toy_policy):
    policy, traced, _ = counting(toy_policy[0])
    sample((policy, toy_policy[1]))
    compiled, traces = generate._cache_size(), len(traced)
    for n, temperature in enumerate((0.0, 0.5, 2.0)):
        sample(
            (policy, toy_policy[1]),
            key=jax.random.key(n),
            eos_ids=jnp.array([n, n + 1]),
            temperature=temperature,
            top_k=n,
            top_p=1.0 - 0.1 * n,
            min_p=0.1 * n,
            first_row=n * B,
        )
    assert generate._cache_size() == compiled
    assert len(traced) == traces


def test_new_eos_ids_and_temperature_take_effect_in_a_compiled_function(toy_policy):
    first = sample(toy_policy, temperature=0.0, eos_ids=EOS)
    eos = jnp.array([first.tokens[0, 0]] * 2)
    ended = sample(toy_policy, temperature=0.0, eos_ids=eos)
    assert np.sum(ended.mask[0]) == 1 and ended.finished[0]
    assert not np.array_equal(sample(toy_policy, temperature=3.0, eos_ids=EOS).tokens, first.tokens)


def test_padding_rows_without_any_token_are_harmless(toy_policy):
    prompts = left_pad([*SEQUENCES[:3], []], S)
    rollout = sample(toy_policy, prompts, eos_ids=EOS)
    assert np.all(np.isfinite(rollout.log_probs))
    assert_same_rollout(rows(rollout, 0, 3 * G), rows(sample(toy_policy, eos_ids=EOS), 0, 3 * G))


def test_tokens_of_probability_zero_are_never_drawn():
    policy, params = make_toy_policy()
    # A vocabulary padded to a round number: the model says -inf there.
    padded = policy.replace(
        unembed=lambda params, hidden: jnp.where(jnp.arange(VOCAB) < 4, hidden @ params["head"], -jnp.inf)
    )
    rollout = sample((padded, params), temperature=5.0)
    assert np.max(rollout.tokens) == 3
    assert np.all(np.isfinite(rollout.log_probs))
    np.testing.assert_array_equal(rollout.kept_mass, 1)
