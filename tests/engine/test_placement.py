import threading
import time

import pytest

from rayseg.engine import cluster
from rayseg.engine.cluster import sizes
from rayseg.engine.work import Work
from rayseg.errors import ConfigError, Stalled

SMALL = Work(list, cpus=0.25)
MODEL = Work(list, cpus=1.0, gpus=1.0, model=True)
STAGES = [SMALL, MODEL, SMALL]


def test_stages_that_would_deadlock_are_refused():
    stages = [Work(list, cpus=1), Work(list, cpus=1, model=True), Work(list, cpus=1)]
    with pytest.raises(ConfigError, match="need 4 CPUs at once, Ray has 2 free CPUs"):
        sizes(stages, [{"CPU": 2.0}])


def test_model_stages_share_what_reading_and_writing_leave():
    stages = [Work(list, cpus=0.25), Work(list, model=True, gpus=0.5), Work(list, model=True, gpus=0.5)]
    cpu_only = sizes(stages, [{"CPU": 2.0}])
    assert sum(size.copies * size.cpus for size in cpu_only) <= 2.0
    assert [size.gpus for size in cpu_only] == [0, 0, 0]
    assert [size.copies for size in sizes(stages, [{"CPU": 64.0, "GPU": 4.0}])[1:]] == [4, 4]


@pytest.mark.parametrize("cpus", [1.0, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_a_copy_fits_on_any_machine_together_with_the_other_stages(cpus, count):
    """Else Ray never starts it on a cluster that has enough CPUs, but on no single machine."""
    found = sizes(STAGES, [{"CPU": 0.0}, *[{"CPU": cpus}] * count])
    assert found[1].copies >= count
    assert found[1].cpus + 3 * SMALL.cpus <= cpus


@pytest.mark.parametrize("cpus", [2.0, 4.0, 8.0])
def test_half_of_the_machines_hold_all_copies(cpus):
    """Else the copies of a machine that dies, and their rows, wait for a new machine."""
    found = sizes(STAGES, [{"CPU": cpus}] * 4)[1]
    assert found.copies / 2 * found.cpus <= cpus - 3 * SMALL.cpus


def test_every_gpu_has_a_copy():
    found = sizes(STAGES, [{"CPU": 0.0}, *[{"CPU": 4.0, "GPU": 2.0}] * 3, {"CPU": 16.0}])
    assert (found[1].copies, found[1].gpus) == (6, 1.0)
    assert 2 * found[1].cpus + 3 * SMALL.cpus <= 4.0


def test_resources_that_are_missing_are_an_error():
    """Else Ray waits for ever, or the stages take CPUs instead of GPUs that other jobs hold for a while."""
    for machines in (
        [{"CPU": 14.0, "GPU": 0.0}],
        [{"CPU": 14.0, "GPU": 0.5}],
        [{"CPU": 0.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 0.0}],
    ):
        with pytest.raises(ConfigError, match="and 1 GPUs of one machine at once"):
            sizes(STAGES, machines, gpus=True)
    for machines in ([{"CPU": 0.2}] * 10, []):
        with pytest.raises(ConfigError, match="CPUs at once"):
            sizes(STAGES, machines)


def test_a_machine_without_free_cpus_does_not_stop_the_others():
    found = sizes(STAGES, [{"CPU": 0.05, "GPU": 1.0}, {"CPU": 16.0, "GPU": 2.0}])
    assert (found[1].copies, found[1].cpus, found[1].gpus) == (2, 1.0, 1.0)


def test_with_models_on_gpus_the_cpus_read_and_write():
    """Else the GPUs of a machine with few CPUs wait for tiles."""
    assert sizes(STAGES, [{"CPU": 4.0, "GPU": 1.0}])[1].cpus == 1.0
    assert sizes(STAGES, [{"CPU": 4.0}])[1].cpus == 3.25


def test_on_a_private_ray_stages_that_do_not_fit_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(cluster, "_machines", lambda: [{"CPU": 2.0, "GPU": 0.0}])
    alone = cluster.sizes_now(STAGES, shared=False, patience=0.0)
    assert alone[1].cpus == 1.25
    assert [size.most for size in alone] == [size.copies for size in alone], "one machine does not grow"
    with pytest.raises(ConfigError, match="need 8"):
        cluster.sizes_now([Work(list, cpus=4)], shared=False, patience=100.0)


def test_an_autoscaler_is_asked_for_needed_and_held_resources_until_the_stages_fit(monkeypatch):
    """It counts all resources of a cluster, not the free ones."""
    asked, left = [], iter([{"CPU": 0.5, "GPU": 0.0}, {"CPU": 4.0, "GPU": 1.0}])
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda *, bundles: asked.append(bundles))
    new = {"CPU": 8.0, "GPU": 0.0}  # a machine that came between the two lists

    def machines(*, free=False):
        return [next(left), new][: 2 if not asked else 1] if free else [{"CPU": 4.0, "GPU": 1.0}]

    monkeypatch.setattr(cluster, "_machines", machines)
    monkeypatch.setattr(cluster, "RELEASE_SECONDS", -1.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    works = [Work(list, cpus=1.0), Work(list, cpus=1.0, gpus=1.0, model=True)]
    reader, model = cluster.sizes_now(works, shared=True, patience=9.0)
    assert (reader.most, model.most) == (reader.copies, model.copies * cluster.GROWTH), "GPUs that join later are used"
    assert asked == [[{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 3.5, "GPU": 1.0}], []]


@pytest.mark.ray
def test_resources_that_other_jobs_hold_are_waited_for(local_ray, monkeypatch, caplog):
    """Else Ray gets actors that never start."""
    import ray

    monkeypatch.setattr(cluster, "RELEASE_SECONDS", 0.2)
    before = cluster.sizes_now(STAGES, shared=True, patience=0.0)
    holders = [ray.remote(num_cpus=3, num_gpus=gpus)(Holder).remote() for gpus in (1, 0)]
    ray.get([holder.ready.remote() for holder in holders])
    try:
        fitting = cluster.sizes_now([SMALL, Work(list, model=True), SMALL], shared=True, patience=0.0)
        with pytest.raises(Stalled, match=r"need 17.* Ray has 2 free CPUs; .* run the same command again"):
            cluster.sizes_now([Work(list, cpus=8.5), SMALL], shared=True, patience=0.3)
        with pytest.raises(Stalled, match="other jobs still hold the cluster's resources; run the same command again"):
            cluster.sizes_now(STAGES, shared=True, patience=0.1)
        began = time.monotonic()
        threading.Timer(1.0, ray.kill, [holders[0]]).start()
        after = cluster.sizes_now(STAGES, shared=True, patience=5.0)
    finally:
        for holder in holders:
            ray.kill(holder)
    assert sum(size.copies * size.cpus for size in fitting) + SMALL.cpus <= 2.0
    assert time.monotonic() - began > 1.0
    assert (before[1].gpus, after[1].gpus) == (1.0, 1.0)
    assert "waiting for free resources on the cluster: the stages need" in caplog.text


class Holder:
    """An actor of another job."""

    def ready(self):
        """Returns once the actor has its resources."""
