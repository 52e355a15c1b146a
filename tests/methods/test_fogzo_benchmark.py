from __future__ import annotations

import math

import torch

from benchmarks.papers.fogzo import cost, least_squares, networks
from benchmarks.papers.fogzo.least_squares import Arm, claims, final_loss, problem


def test_problem_is_solved_by_a_point_of_the_grid_and_has_one_sharp_direction():
    matrix, target, _ = problem(0, True, 2)
    solution = torch.linalg.solve(matrix.double(), target.double())
    torch.testing.assert_close(solution, least_squares.rounded(solution), atol=1e-3, rtol=0)
    values = torch.linalg.eigvalsh(matrix.T @ matrix)
    assert values[-1] > 50 * values[-2].clamp_min(1)
    assert torch.linalg.eigvalsh(torch.matmul(*[problem(0, False, 2)[0].T, problem(0, False, 2)[0]]))[-1] < 10


def test_a_run_is_a_function_of_its_seeds():
    arm = Arm("", "fogzo", 40)
    losses = [final_loss(arm, 0.1, 0, seed, False, True, 2) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_straight_through_solves_the_well_conditioned_problem():
    assert final_loss(Arm("", "ste", 600), 0.01, 0, 0, True, False, 2) < 5


def test_claims_compare_the_best_of_each_arm():
    def row(arm, loss, **other):
        return {"arm": arm, "loss": loss, "spiked": True, "bits": 2} | other

    rows = [
        row("STE", 20.0),
        row("STE", 30.0),
        row("STE, equal compute", 20.0),
        row("FOGZO", 10.0),
        row("FOGZO", 1.0, spiked=False),
        row("STE", 0.0, spiked=False),
        row("FOGZO", 3.0, bits=1),
        row("STE", 4.0, bits=1),
        row("70% STE + 30% FOGZO", 11.0),
        row("n-SPSA, equal compute", 15.0),
    ]
    assert [c["held"] for c in claims(rows)] == [True, True, False, True, True, False]


def test_rates_are_tuned_in_two_rounds():
    (row,) = least_squares.run([Arm("FOGZO", "fogzo", 40)], problems=2, seeds=2, decay=True)
    assert row["lr"] in least_squares.RATES
    assert math.isfinite(row["loss"])
    assert row["spread"] > 0


def test_every_network_trains_in_every_arm():
    for name, task in networks.TASKS.items():
        for arm in networks.ARMS:
            loss, score = networks.final(name, arm, task.rates[0], 0, 0.03)
            assert math.isfinite(loss), (name, arm)
            assert math.isfinite(score), (name, arm)


def test_ratio_at_equal_loss():
    def row(arm, forwards, loss):
        return {"arm": arm, "forwards": forwards, "loss": loss}

    spsa = [row("spsa n=1", 3000, 9.0), row("spsa n=4", 1500, 12.0)]
    assert least_squares.equal_loss([*spsa, row("fogzo n=1", 1500, 8.0), row("fogzo n=4", 500, 10.0)]) == 2
    assert least_squares.equal_loss([*spsa, row("fogzo n=1", 1500, 10.0)]) is None


def test_cost_compares_steps_that_learn():
    rows = cost.run((2,), seconds=0.1)
    assert [row["arm"] for row in rows] == ["STE", "FOGZO n=1", "FOGZO n=4", "n-SPSA n=1"]
    assert rows[0]["ratio"] == 1
