"""NViT pruning against other criteria and Torch-Pruning: accuracy at equal MACs and latency, and CPU latency.

    python -m benchmarks.papers.nvit [--quick] [--data digits|fashion-mnist|all] [--part accuracy|latency|all]
                                     [--seeds N] [--json FILE]

One dense micro ViT is trained for each seed. Every criterion prunes a copy of it in the same loop: score 6
minibatches of 100 images, the same ones each time, remove the 3 lowest groups, repeat until the MAC budget is
reached, with no training in between. Torch-Pruning gets the same minibatches and budgets, and settings that
were searched on held-out training images. Reported is the top-1 accuracy of the compacted model, at once and
after 3 epochs of finetuning.

--quick runs digits at 40 % of the MACs with the criteria of the gate, and Torch-Pruning with the settings
that a full run had found; the latency part is left out unless asked for. The exit code is 0 if the gate held,
1 if not; it is 0 also where the gate was not run (no digits, or the latency part alone).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.papers.data import Images
from benchmarks.papers.nvit import latency
from benchmarks.papers.nvit.criteria import CRITERIA, QUICK, SHORT, dense_model, prune
from benchmarks.papers.nvit.data import TASKS, Task
from benchmarks.papers.nvit.gate import PEERS, Results, claims
from benchmarks.papers.nvit.peer import TUNED, PeerFailed, Setting, macs, prune_peer, search
from benchmarks.papers.report import cell, print_claims
from benchmarks.papers.training import accuracy, train
from pyvitfast.models.config import ViTConfig


def run_task(task: Task, options: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy of all criteria and of Torch-Pruning on one data set."""
    budgets = [0.4] if options.quick else [0.6, 0.4, 0.25]
    names = list(QUICK if options.quick else CRITERIA if task.name == "digits" else SHORT)
    settings: dict[str, dict[float, Setting]] = {}
    searched: list[dict[str, Any]] = []
    if options.quick:
        for peer, isomorphic in zip(PEERS, (False, True)):
            settings[peer] = {budget: TUNED[task.name, isomorphic, budget] for budget in budgets}
    else:
        prepared: list[tuple[nn.Module, Images]] = []
        for seed in range(min(task.tuning_seeds, options.seeds)):
            data = task.load(seed, options.data_dir).held_out(task.held_out)
            prepared.append((dense_model(task, data, seed), data))
        for peer, isomorphic in zip(PEERS, (False, True)):
            other = settings.get(PEERS[0], {})
            settings[peer], tried = search(task, prepared, isomorphic, budgets, other, progress)
            searched += tried

    results: Results = {
        name: {str(b): {"one-shot": [], "finetuned": [], "macs": []} for b in budgets}
        for name in (*names, *PEERS)
    }
    dense_accuracy: list[float] = []
    models: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []

    def evaluate(name: str, budget: float, seed: int, slim: nn.Module, data: Images, whole: int) -> None:
        entry = results[name][str(budget)]
        entry["macs"].append(macs(slim) / whole)
        entry["one-shot"].append(accuracy(slim, data))
        train(slim, data, 3, task.finetune_lr, task.batch, seed)
        entry["finetuned"].append(accuracy(slim, data))
        last = {key: values[-1] for key, values in entry.items()}
        dims = ViTConfig.from_model(slim).dims.to_dict()
        models.append({"criterion": name, "budget": budget, "seed": seed, "dims": dims} | last)
        progress(
            f"{task.name}, seed {seed}: {name} at {last['macs']:.1%} MACs: "
            f"{last['one-shot']:.1f} -> {last['finetuned']:.1f} %"
        )

    for seed in range(options.seeds):
        data = task.load(seed, options.data_dir)
        dense = dense_model(task, data, seed)
        whole = macs(dense)
        dense_accuracy.append(accuracy(dense, data))
        progress(f"{task.name}, seed {seed}: dense {dense_accuracy[-1]:.1f} %")
        for name in names:
            for budget, slim in prune(
                copy.deepcopy(dense), task, data, CRITERIA[name](), budgets, seed
            ).items():
                evaluate(name, budget, seed, slim, data, whole)
        for name in PEERS:
            for budget in budgets:
                try:
                    slim = prune_peer(dense, data, settings[name][budget], budget, seed)
                except PeerFailed as error:
                    failures.append({"criterion": name, "budget": budget, "seed": seed, "reason": str(error)})
                    progress(f"{task.name}, seed {seed}: {name} at {budget:.0%}: FAILED: {error}")
                    continue
                evaluate(name, budget, seed, slim, data, whole)
    return {
        "seeds": options.seeds,
        "dense": dense_accuracy,
        "results": results,
        "models": models,
        "failures": failures,
        "settings": {name: {str(b): asdict(s) for b, s in found.items()} for name, found in settings.items()},
        "searched": searched,
    }


def print_task(name: str, found: dict[str, Any]) -> None:
    """The table of one data set."""
    results = found["results"]
    budgets = list(next(iter(results.values())))
    print(
        f"\n{name}: dense {cell(found['dense'])} % top-1, {found['seeds']} seeds, mean ± sd; MACs left in %"
    )
    heads = (f"{'MACs':>8}{f'{float(b):.0%} one-shot':>15}{'3 epochs':>15}" for b in budgets)
    print(f"{'criterion':<28}" + "".join(heads))
    for criterion, row in results.items():
        line = f"{criterion:<28}"
        for budget in budgets:
            left = [100 * share for share in row[budget]["macs"]]
            line += f"{f'{statistics.mean(left):.1f}' if left else '-':>8}"
            line += "".join(f"{cell(row[budget][when]):>15}" for when in ("one-shot", "finetuned"))
        print(line)
    tried = len(found["searched"])
    how = f"the best of {tried} tried" if tried else "as an earlier full run had found them"
    print(f"Torch-Pruning's settings, {how} (tuned for the accuracy after finetuning):")
    for criterion, chosen in found["settings"].items():
        for budget, setting in chosen.items():
            print(f"  {criterion} at {float(budget):.0%}: {Setting(**setting)}")
    for failed in found["failures"]:
        where = f"{failed['criterion']} at {failed['budget']:.0%}, seed {failed['seed']}"
        print(f"  FAILED {where}: {failed['reason']}")
    bad = [entry for entry in found["searched"] if entry["failure"]]
    if bad:
        print(f"  {len(bad)} of the settings tried never reached their budget; see the JSON file")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.nvit", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="digits, 40 %% of the MACs, the gate's criteria")
    parser.add_argument("--data", choices=(*TASKS, "all"), help="default: all; with --quick digits")
    parser.add_argument(
        "--part", choices=("accuracy", "latency", "all"), help="default: all; with --quick accuracy"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--curves", type=Path, metavar="FILE", help="with --part latency: time the models of this earlier run"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="for downloads")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.quick and options.data not in (None, "digits"):
        parser.error(f"--quick runs digits only, got --data {options.data}")
    part = options.part or ("accuracy" if options.quick else "all")
    if part != "latency" and find_spec("torch_pruning") is None:
        parser.error("Torch-Pruning is missing: pip install 'pyvitfast[bench]', or use --part latency")
    chosen = options.data or ("digits" if options.quick else "all")
    start = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    found: dict[str, Any] = {
        "paper": "nvit",
        "quick": options.quick,
        "part": part,
        "seeds": options.seeds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tasks": {},
        "claims": [],
    }

    def save() -> None:
        found["seconds"] = time.perf_counter() - start
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))

    if part != "latency":
        for name in TASKS if chosen == "all" else (chosen,):
            found["tasks"][name] = run_task(TASKS[name], options, progress)
            save()
            print_task(name, found["tasks"][name])
        if "digits" in found["tasks"]:
            print("\ndigits at 40 % of the MACs:")
            found["claims"] = claims(found["tasks"]["digits"]["results"])
            print_claims(found["claims"])
        else:
            print("\nThe gate was not run: it needs digits.")
    elif options.curves:
        earlier = json.loads(options.curves.read_text())
        found["tasks"] = {name: entry for name, entry in earlier["tasks"].items() if chosen in (name, "all")}
    else:
        print("skipped  accuracy at equal latency: needs --curves FILE of an earlier accuracy run")
    if part != "accuracy":
        for name, entry in found["tasks"].items():
            entry["equal latency"] = latency.equal_latency(TASKS[name], entry, progress)
            latency.print_equal_latency(name, entry["equal latency"])
            save()
        found["latency"] = latency.cpu_latency(options.quick, progress)
        latency.print_cpu_latency(found["latency"])
        save()
        found["half"] = latency.half_of_the_latency(options.quick, progress)
        latency.print_half(found["half"])
        print_claims(found["half"]["rows"])
        found["claims"] += found["half"]["rows"]
    save()
    return 0 if all(claim["held"] for claim in found["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
