"""Inputs of concurrent requests in batches of one model."""

import asyncio

import numpy as np
import pytest

from rayseg.errors import ModelError
from rayseg.serve.models import Batches


def numbers(*values):
    return [np.array([value]) for value in values]


def joined(size=4, at_once=1, wait=0.0, fails=()):
    """(batches, the sizes that were computed)."""
    sizes = []

    async def compute(inputs):
        sizes.append(len(inputs))
        await asyncio.sleep(0.01)
        if {int(one[0]) for one in inputs} & set(fails):
            raise ValueError("broken")
        return [10 * one for one in inputs]

    return Batches(compute, size=size, at_once=at_once, wait=wait), sizes


def test_inputs_that_arrive_during_a_batch_form_the_next_one():
    async def run():
        batches, sizes = joined()
        first = asyncio.create_task(batches(numbers(1)))
        await asyncio.sleep(0.001)
        rest = await asyncio.gather(*(batches(numbers(at)) for at in range(2, 8)), first)
        return sizes, [int(one[0][0]) for one in rest]

    assert asyncio.run(run()) == ([1, 4, 2], [20, 30, 40, 50, 60, 70, 10])


def test_a_batch_waits_for_further_inputs():
    async def run():
        batches, sizes = joined(wait=0.05)
        await asyncio.gather(batches(numbers(1)), batches(numbers(2, 3)))
        return sizes

    assert asyncio.run(run()) == [3]


def test_an_error_is_that_of_its_batch_alone():
    async def run():
        batches, _ = joined(size=1, fails=(2,))
        return await asyncio.gather(*(batches(numbers(at)) for at in (1, 2, 3)), return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert (int(first[0][0]), int(third[0][0])) == (10, 30)
    assert isinstance(second, ValueError)


def test_too_few_results_are_an_error_of_every_request():
    async def compute(inputs):
        return inputs[1:]

    async def run():
        batches = Batches(compute, size=4, at_once=1)
        async with asyncio.timeout(5):
            return await asyncio.gather(*(batches(numbers(at)) for at in (1, 2)), return_exceptions=True)

    assert [type(one) for one in asyncio.run(run())] == [ModelError, ModelError]


def test_inputs_of_a_request_that_was_cancelled_are_not_computed():
    async def run():
        batches, sizes = joined()
        first = asyncio.create_task(batches(numbers(1)))
        await asyncio.sleep(0.001)
        gone = asyncio.create_task(batches(numbers(2, 3)))
        await asyncio.sleep(0.001)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.gather(first, batches(numbers(4)))
        return sizes

    assert asyncio.run(run()) == [1, 1]
