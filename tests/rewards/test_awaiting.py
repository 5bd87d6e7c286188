"""Async reward functions are awaited together on one loop, wherever they are called from."""

import asyncio
import functools
import threading

import numpy as np
import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import Reward, RewardError, load_rewards


def scored(*functions, texts=("a", "abc"), **columns):
    rewards = [Reward(name=f"f{i}", function=function) for i, function in enumerate(functions)]
    return call_rewards(rewards, ["p"] * len(texts), list(texts), columns).T.tolist()


async def length(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


class Judge:
    async def __call__(self, completions):
        return await length(completions)


def returns_a_coroutine(completions):
    return length(completions)


@pytest.mark.parametrize(
    "function",
    [length, Judge(), functools.partial(length, extra=1), returns_a_coroutine],
    ids=["function", "object", "partial", "coroutine"],
)
def test_every_shape_of_an_async_function_is_awaited(function):
    assert scored(function) == [[1, 3]]


def test_from_a_file_with_columns_and_none(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "async def slow(prompts, completions, answer, scale=1, **columns):\n"
        "    await asyncio.sleep(0.001)\n"
        "    return [scale * float(c == a) if a else None for c, a in zip(completions, answer)]\n"
    )
    (reward,) = load_rewards([RewardConfig(function=f"{tmp_path}/mine.py:slow", arguments={"scale": 2})])
    values = call_rewards([reward], ["p"] * 3, ["a", "b", "c"], {"answer": ["a", "c", None]})[:, 0]
    np.testing.assert_array_equal(values, np.array([2, 0, np.nan], np.float32))


def test_several_async_functions_wait_at_the_same_time():
    # Each waits for the other, and for a function between them that is not async: one by one they never end.
    events = [threading.Event() for _ in range(3)]

    def waits(own):
        async def f(completions):
            events[own].set()
            for event in events:
                while not event.is_set():
                    await asyncio.sleep(0.001)
            return [float(own)] * len(completions)

        return f

    def plain(completions):
        events[2].set()
        return [9.0] * len(completions)

    assert scored(waits(0), plain, waits(1)) == [[0, 0], [9, 9], [1, 1]]


def test_inside_a_running_loop():
    async def notebook():
        return scored(length)

    assert asyncio.run(notebook()) == [[1, 3]]


def test_one_loop_for_all_batches():
    # A client that a reward file keeps, such as a session of aiohttp, belongs to its first loop.
    loops = []

    async def f(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        scored(f)
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError()]
)
def test_an_error_of_an_async_function_is_named(error):
    async def f(completions):
        await asyncio.sleep(0)
        if "bad" in completions:
            raise error
        return [0.0] * len(completions)

    name = type(error).__name__
    with pytest.raises(RewardError, match=rf"`f0` .*raised {name}.* at test_awaiting.py:\d+ .*row 1 .*'bad'"):
        scored(f, texts=["a", "bad"])
    assert scored(f) == [[0, 0]]  # the loop goes on


def test_an_exit_in_a_task_of_its_own():
    async def exits():
        raise SystemExit(3)

    async def f(completions):
        await asyncio.gather(exits())

    with pytest.raises(RewardError, match=r"raised SystemExit\(3\)"):
        scored(f)
    assert scored(length) == [[1, 3]]


def test_an_async_generator_is_not_a_list():
    async def f(completions):
        yield 1.0

    with pytest.raises(RewardError, match=r"`f0` .*returned async_generator, not a list"):
        scored(f)


def test_a_wrong_call_is_an_error_of_the_reward():
    async def f(completions, missing):
        return []

    with pytest.raises(RewardError, match=r"`f0` .*missing 1 required positional argument: 'missing'"):
        scored(f)


def test_a_failure_cancels_those_that_still_wait():
    cancelled = threading.Event()

    async def waits(completions):
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fails(completions):
        await asyncio.sleep(0.01)
        raise ValueError("no")

    with pytest.raises(RewardError, match=r"`f0` .*no"):
        scored(fails, waits)
    assert cancelled.wait(10)
