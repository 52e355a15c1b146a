from __future__ import annotations

import torch

from benchmarks.papers.fogzo import least_squares
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
        row("70% STE + 30% FOGZO", 11.0),
        row("n-SPSA, equal compute", 15.0),
    ]
    assert [c["held"] for c in claims(rows)] == [True, True, False, True]
