"""Which runs a comparison makes, with metrics that are functions of the rate in place of trainings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from compare.arms import parse_arms, parse_grid
from compare.schedule import Point, Round, Run, best_point, edges, rounds

INF = float("inf")


def made(arms: str, score: Callable[[Run], float], grid: str = "optimizer.lr=1e-3:1.6e-2:5", **options) -> list[Round]:
    """All rounds; a run is scored only after it was asked for."""
    asked: set[Run] = set()

    def checked(run: Run) -> float:
        assert run in asked, "its result is not there yet"
        return score(run)

    found = []
    settings = {"seeds": [0, 1, 2], "widen": 4, "equal": True} | options
    for round_ in rounds(parse_arms(arms, parse_grid([grid])), score=checked, **settings):
        assert not asked & {*round_.runs}, "no run is asked for twice"
        asked |= {*round_.runs}
        found.append(round_)
    return found


def rate(run: Run) -> float:
    return float(dict(run.point)["optimizer.lr"])


def best_at(**optima: float) -> Callable[[Run], float]:
    return lambda run: abs(math.log(rate(run) / optima[run.arm]))


def tried(found: list[Round], arm: str) -> list[float]:
    return [rate(run) for round_ in found for run in round_.runs if run.arm == arm and run.seed == 0]


def test_inside_the_grid():
    found = made("lora,full", best_at(lora=4e-3, full=2e-3))
    assert [len(round_.runs) for round_ in found] == [10, 12]
    assert {(run.arm, rate(run)) for run in found[1].runs} == {
        ("lora", 2e-3), ("lora", 4e-3), ("lora", 8e-3), ("full", 1e-3), ("full", 2e-3), ("full", 4e-3),
    }  # fmt: skip
    assert {run.seed for run in found[1].runs} == {1, 2}


@pytest.mark.parametrize(("optimum", "further"), [(5e-2, [3.2e-2, 6.4e-2, 0.128]), (3e-4, [5e-4, 2.5e-4, 1.25e-4])])
def test_an_edge_is_widened_until_the_best_is_inside(optimum: float, further: list[float]):
    found = made("lora,full", best_at(lora=optimum, full=4e-3))
    assert tried(found, "lora")[5:] == pytest.approx(further)
    assert "lora (optimizer.lr " in found[1].reason
    assert "full" not in found[1].reason
    inner = tried(found, "full")[5:]
    assert len(inner) == len(further), "the other arm gets as many"
    assert all(2e-3 < value < 8e-3 for value in inner), "around its best"
    counts = Counter(run.arm for round_ in found for run in round_.runs)
    assert counts["lora"] == counts["full"]


def test_only_what_is_needed():
    found = made("lora,full", best_at(lora=5e-2, full=4e-3), equal=False)
    assert (len(tried(found, "lora")), len(tried(found, "full"))) == (8, 5)


def test_a_value_that_cannot_be_trained_is_not_tried():
    """Beyond an edge nothing is tried then, and between two values the next gap, if there is one."""
    found = made("lora,full", best_at(lora=5e-2, full=4e-3), allowed=lambda run: rate(run) <= 1.6e-2)
    assert [len(round_.runs) for round_ in found] == [10, 12]
    found = made("lora,full", best_at(lora=5e-2, full=4e-3), allowed=lambda run: run.arm == "lora" or rate(run) > 5e-3)
    assert tried(found, "full")[5] == pytest.approx(math.sqrt(4e-3 * 8e-3), rel=1e-3)


def test_widening_ends():
    found = made("lora", lambda run: -rate(run), widen=2)
    assert [len(round_.runs) for round_ in found] == [5, 1, 1, 6]
    again = sorted({rate(run) for run in found[-1].runs})
    assert again == pytest.approx([1.6e-2, 3.2e-2, 6.4e-2]), "two neighbours on the one side that there is"
    arms = parse_arms("lora", parse_grid(["optimizer.lr=1e-3:1.6e-2:5"]))
    best = {"lora": (("optimizer.lr", "0.064"),)}
    said = edges(arms, [run for round_ in found for run in round_.runs], best)
    assert said == {"lora": "the best optimizer.lr, 0.064, is the largest that was tried"}
    assert edges(arms, found[0].runs, {"lora": (("optimizer.lr", "0.004"),)}) == {}


def test_failed_runs_are_the_worst_and_not_repeated():
    def score(run: Run) -> float:
        return INF if rate(run) > 3e-3 else -rate(run)  # diverges right above its best

    found = made("lora", score)
    assert [len(round_.runs) for round_ in found] == [5, 4]
    assert {rate(run) for run in found[1].runs} == {1e-3, 2e-3}


def test_an_arm_that_never_works():
    found = made("lora,full", lambda run: INF if run.arm == "lora" else best_at(full=4e-3)(run), widen=2)
    assert tried(found, "lora")[5:] == pytest.approx([5e-4, 2.5e-4]), "smaller rates may"
    assert {run.arm for run in found[-1].runs} == {"full"}


def test_seeds_for_the_best_alone():
    (*_, again) = made("lora,full", best_at(lora=4e-3, full=2e-3), neighbours=False)
    assert [(run.arm, rate(run), run.seed) for run in again.runs] == [
        ("lora", 4e-3, 1), ("lora", 4e-3, 2), ("full", 2e-3, 1), ("full", 2e-3, 2),
    ]  # fmt: skip
    assert again.reason == "the best of every arm with the other seeds"
    assert len(made("lora", lambda run: INF, neighbours=False)) == 5, "none where all failed"


def test_two_grids_multiply():
    arms = parse_arms("lora", parse_grid(["optimizer.lr=1e-3:4e-3:3", "adapter.rank=4,8"]))
    found = list(rounds(arms, [0], lambda run: abs(math.log(rate(run) / 2e-3)), 4))
    assert [len(round_.runs) for round_ in found] == [6]
    assert found[0].runs[1].name == "lora/optimizer.lr=0.001,adapter.rank=8,seed=0"


def test_the_best_point_is_the_best_mean_of_those_with_the_most_seeds():
    lucky, good, bad = ((("optimizer.lr", value),) for value in ("1e-3", "2e-3", "4e-3"))
    scores: dict[tuple[Point, int], float] = {
        (lucky, 0): 0.1, (good, 0): 0.3, (good, 1): 0.2, (bad, 0): 0.2, (bad, 1): 0.4,
    }  # fmt: skip
    runs = [Run("lora", point, seed) for point, seed in scores]
    assert best_point(runs, lambda run: scores[run.point, run.seed]) == good
    assert best_point(runs[:1], lambda run: scores[run.point, run.seed]) == lucky
