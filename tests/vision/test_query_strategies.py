import numpy as np
import pytest

from rayseg.errors import ConfigError
from rayseg.vision import query_strategies
from rayseg.vision.query_strategies import STRATEGIES, Pool, budget


def pool_of(p_NK, *, features=None, labelled=None):
    p = np.asarray(p_NK, np.float64)
    nothing = np.zeros((0, 1))
    return Pool(p, np.zeros((len(p), 1)) if features is None else features, nothing if labelled is None else labelled)


def chosen(strategy, pool, count, seed=0):
    return STRATEGIES[strategy](pool, count, np.random.default_rng(seed))


@pytest.fixture
def table():
    rng = np.random.default_rng(5)
    return rng.dirichlet(np.full(4, 0.5), 40)


def test_uncertainty_is_what_its_definition_says():
    p = [[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.4, 0.1, 0]]
    assert query_strategies.entropy(p) == pytest.approx(
        [np.log(4), 0, 0.5 * np.log(2) - 0.4 * np.log(0.4) - 0.1 * np.log(0.1)]
    )
    assert query_strategies.margin(p) == pytest.approx([0, 1, 0.1])
    assert query_strategies.confidence(p) == pytest.approx([0.25, 1, 0.5])


@pytest.mark.parametrize(("strategy", "first"), [("entropy", [2, 0]), ("margin", [1, 2]), ("least-confidence", [2, 0])])
def test_the_least_certain_images_come_first(strategy, first):
    p = [[0.40, 0.35, 0.25], [0.49, 0.50, 0.01], [0.36, 0.33, 0.31], [0.9, 0.05, 0.05]]
    assert chosen(strategy, pool_of(p), 2).positions.tolist() == first


def test_equal_images_are_taken_in_their_order_and_never_twice(table):
    same = pool_of(np.full((5, 3), 1 / 3), features=np.ones((5, 2)), labelled=np.ones((1, 2)))
    for strategy in ("entropy", "margin", "least-confidence", "k-center"):
        assert chosen(strategy, same, 3).positions.tolist() == [0, 1, 2]
    for strategy in STRATEGIES:
        assert sorted(chosen(strategy, same, 9).positions.tolist()) == [0, 1, 2, 3, 4]


def test_random_choice_depends_on_the_seed_alone(table):
    picks = [chosen("random", pool_of(table), 10, seed).positions.tolist() for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]
    assert len(set(picks[0])) == 10


def test_k_center_takes_what_is_farthest_from_all_that_is_labelled_or_taken():
    features = np.array([[0.0, 1], [0, 10], [9, 0], [0.5, 9.5], [4, 4]])
    choice = chosen("k-center", pool_of(np.full((5, 2), 0.5), features=features, labelled=np.array([[0.0, 0]])), 3)
    assert choice.positions.tolist() == [1, 2, 4]
    assert choice.scores == pytest.approx([10, 9, np.sqrt(32)])


def test_badge_begins_with_the_longest_gradient_and_draws_by_distance_between_gradients(table):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(40, 3))
    residual = table.copy()
    residual[np.arange(40), table.argmax(1)] -= 1
    gradients = (residual[:, :, None] * features[:, None, :]).reshape(40, -1)
    choice = chosen("badge", pool_of(table, features=features), 6, seed=3)
    lengths = np.linalg.norm(gradients, axis=1)
    assert choice.positions[0] == lengths.argmax()
    assert choice.scores[0] == pytest.approx(lengths.max())
    gaps = [
        np.linalg.norm(gradients[at] - gradients[choice.positions[:k]], axis=1).min()
        for k, at in enumerate(choice.positions)
        if k
    ]
    assert choice.scores[1:] == pytest.approx(gaps)


def test_badge_leaves_copies_of_what_it_has_taken(table):
    features = np.repeat(np.array([[1.0, 0], [0, 1], [-1, 0]]), 20, axis=0)
    pool = pool_of(np.repeat([[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]], 20, axis=0), features=features)
    for seed in range(5):
        assert {int(at) // 20 for at in chosen("badge", pool, 3, seed).positions} == {0, 1, 2}


@pytest.mark.real
def test_scores_and_picks_are_those_of_the_reference(shared):
    golden = np.load(shared / "golden/als4gan/al_picks.npz")
    assert query_strategies.entropy(golden["proba"]) == pytest.approx(golden["entropy"], abs=1e-5)
    assert query_strategies.margin(golden["proba"]) == pytest.approx(golden["margin"], abs=1e-5)
    for strategy in ("entropy", "margin"):
        for count in (1, 5, 16, 60):
            picks = chosen(strategy, pool_of(golden["proba"]), count).positions
            assert sorted(picks.tolist()) == golden[f"{strategy}_top{count}"].tolist()


@pytest.mark.real
def test_the_numbers_of_images_are_those_of_the_reference(shared):
    golden = np.load(shared / "golden/als4gan/pool_arithmetic.npz")
    for images, ratio, alpha, beta, target, initial, query, rounds, *_ in golden["table"]:
        found = budget(int(images), ratio, alpha=alpha, beta=beta, count_pool=False)
        assert (found.target, found.initial, found.query, found.queries) == (target, initial, query, rounds)


def test_the_first_images_count_as_labelled_unless_the_published_list_is_wanted():
    assert budget(1679, 0.02, alpha=0.5, beta=0.9) == query_strategies.Budget(34, 17, 16, 2)
    assert budget(1679, 0.02, alpha=0.5, beta=0.9, count_pool=False) == query_strategies.Budget(34, 17, 16, 3)
    assert budget(40, 0.1, alpha=0.1, beta=0.9) == query_strategies.Budget(4, 1, 1, 3)
    assert budget(10, 1.0, alpha=1.0, beta=0.9).queries == 0


@pytest.mark.parametrize("images", [37, 216, 1000])
@pytest.mark.parametrize("classes", [2, 6, 21])
def test_too_small_a_share_is_refused_with_the_least_that_is_possible(images, classes):
    with pytest.raises(ConfigError, match="fewer than one for each of") as refusal:
        query_strategies.expect_enough(images, 0.5 / images, classes)
    least = float(str(refusal.value).rsplit(" ", 1)[1])
    query_strategies.expect_enough(images, least, classes)
    with pytest.raises(ConfigError):
        query_strategies.expect_enough(images, least - 2e-4, classes)
    with pytest.raises(ConfigError, match="expected one per class"):
        query_strategies.expect_enough(1, 1.0, 2)
