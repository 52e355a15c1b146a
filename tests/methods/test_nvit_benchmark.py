"""The gate of the paper benchmark, on made-up results."""

from benchmarks.papers.nvit import CRITERIA, QUICK, claims


def results(**one_shot):
    names = {"nvit": "nvit", "magnitude": "magnitude, global", "random": "random", "mean": "square of mean"}
    return {
        names[key]: {"0.4": {"one-shot": values, "finetuned": [v + 1 for v in values]}}
        for key, values in one_shot.items()
    }


def test_gate_reads_means_over_seeds():
    good = claims(results(nvit=[93.0, 91.0], magnitude=[40.0, 84.0], random=[10.0, 12.0], mean=[80.0, 82.0]))
    assert [claim["held"] for claim in good] == [True] * 4
    assert [claim["measured"] for claim in good] == [30.0, 81.0, 11.0, 30.0]
    bad = claims(results(nvit=[92.0], magnitude=[91.0], random=[50.0], mean=[88.0]))
    assert [claim["held"] for claim in bad] == [False] * 4


def test_quick_criteria_exist():
    assert set(QUICK) < set(CRITERIA)
