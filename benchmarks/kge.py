"""Training and evaluation of knowledge graph embeddings, against plain PyTorch and against PyKEEN.

    PERMJAX_DATA=data python benchmarks/kge.py
    python benchmarks/kge.py --cases umls --no-pykeen      # a quick look

NFE-1 and NFE-2 on UMLS and Kinships (d = 128, batches of 256) and WN18RR (d = 1024, batches of 128, as published).
Processes of their own, with pinned threads:

- `step`: both sides in one process, in turn, from the same tables with the same batches: scores of all entities,
  binary softplus summed over them, gradient, Adam. The side of PyTorch is the usual way to write it: embeddings, each
  square expanded into matrix products (two for NFE-1, five for NFE-2), `torch.optim.Adam`. Medians of several rounds;
  compilation is apart. `loss_difference` compares the losses of the first round, relative.
- `evaluation`: filtered ranks of the tail and the head of test triples (the first ones of WN18RR). The side of PyTorch
  scores batches and then goes over their queries with NumPy, as released code does. What is known of the graph is laid
  out once, before, on both sides (ours: `seconds_to_lay_out`).
- `peak_gib`: the largest memory of a process that only trains, at d = 1024.
- `pykeen`: ComplEx (64 complex numbers, Adam with rate .01) on both sides until a test MRR is reached, and our NFE-1
  beside it. PyKEEN trains in its `LCWA` loop with inverse triples, softplus loss and batches of 64, the best of what
  was tried. Compilation and start are on the clock (`warm_seconds`: without), the evaluation every few epochs is not.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "kge.json"
FAMILIES = ("nfe_1", "nfe_2")


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph with its setting, and how long to measure."""

    graph: str
    dimension: int
    batch_size: int
    steps: int  # per round
    rounds: int
    tested: int  # triples


CASES = {
    "umls": Case("umls", 128, 256, 40, 15, 661),
    "kinships": Case("kinships", 128, 256, 66, 11, 1074),
    "wn18rr": Case("wn18rr", 1024, 128, 2, 3, 128),
}
AIMS = {"umls": 2.5, "kinships": 2.5, "wn18rr": 2.0, "evaluation": 5.0, "memory": 0.8}
TARGETS = {"umls": 0.75, "kinships": 0.65}
"""Test MRR that both sides have to reach."""
EVERY, LONGEST = 5, 100
"""Epochs between evaluations on the way there, and at most."""


# the side of PyTorch


def torch_model(family: str, tables: dict[str, dict[str, np.ndarray]]) -> Any:
    """NFE-1 or NFE-2 as a module; its forward pass gives the scores of all entities."""
    import torch

    def embedding(values: np.ndarray) -> torch.nn.Embedding:
        return torch.nn.Embedding.from_pretrained(torch.tensor(values), freeze=False)

    def square(q: Any, k: Any) -> Any:
        return (q * q).sum(1, keepdim=True) + (k * k).sum(1) - 2 * q @ k.T

    def product(q: tuple[Any, Any], k: tuple[Any, Any]) -> Any:
        """The sum over coordinates of (q - k)(q' - k') for two pairs."""
        own, other = (q[0] * q[1]).sum(1, keepdim=True), (k[0] * k[1]).sum(1)
        return own + other - q[0] @ k[1].T - q[1] @ k[0].T

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.scale, self.shift = (
                embedding(tables[table][part])
                for table, part in (("entity", "mean"), ("relation", "scale"), ("relation", "shift"))
            )
            slopes = tables["entity"]["slopes"]
            self.slopes = torch.nn.ModuleList([embedding(slopes[:, k].copy()) for k in range(slopes.shape[1])])

        def forward(self, heads: Any, relations: Any) -> Any:
            scale = self.scale(relations)
            mean = (scale * self.mean(heads) + self.shift(relations), self.mean.weight)
            slopes = [((scale * slope(heads)).abs(), slope.weight.abs()) for slope in self.slopes]
            if family == "nfe_1":
                return -square(*mean) - square(*slopes[0])
            (first, key_first), (second, key_second) = slopes
            cross = product((mean[0], second - first), (mean[1], key_second - key_first))
            halves = (square(first, key_first) + square(second, key_second)) / 2
            return -square(*mean) - halves - float(np.sqrt(2 / np.pi)) * cross

    return Model()


class TorchSide:
    """Training and evaluation of a module in the usual way."""

    def __init__(self, family: str, tables: dict[str, dict[str, np.ndarray]], gamma: float, rate: float):
        import torch

        self.model, self.gamma = torch_model(family, tables), gamma
        self.adam = torch.optim.Adam(self.model.parameters(), lr=rate)

    def train(self, batches: list[tuple[Any, Any, Any]]) -> float:
        """One step for each batch; the mean loss of all."""
        from torch.nn.functional import softplus

        total = 0.0
        for heads, relations, tails in batches:
            scores = self.gamma + self.model(heads, relations)
            signs = scores.new_ones(scores.shape).scatter_(1, tails[:, None], -1.0)
            loss = softplus(signs * scores).sum(1).mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            total += loss.item()
        return total / len(batches)

    def mrr(self, triples: np.ndarray, known: dict[tuple[int, int], list[int]], batch_size: int) -> float:
        """The mean reciprocal filtered rank, query by query."""
        import torch

        found = []
        for first in range(0, len(triples), batch_size):
            batch = triples[first : first + batch_size]
            with torch.no_grad():
                scores = self.model(*torch.tensor(batch[:, :2]).long().T).numpy()
            for row, (head, relation, tail) in zip(scores, batch.tolist(), strict=True):
                answer = row[tail]
                row[known[head, relation]] = -np.inf
                found.append(1 / (1 + (row >= answer).sum()))
        return float(np.mean(found))


# our side


class OurSide:
    """The programs of permjax for one seed."""

    def __init__(self, family: Any, graph: Any, training: Any):
        import jax
        import jax.numpy as jnp

        from permjax.kge.batches import Examples, examples
        from permjax.kge.step import programs

        self.training, self.keys, self.done = training, jax.random.key(0)[None], 0
        self.programs = programs(family, training, graph.size, 2 * len(graph.relations), 0)
        self.state = self.programs.init(self.keys)
        self.found = Examples(*map(jnp.asarray, examples(graph, grouped=False)))

    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        """A copy of the tables."""
        params = self.state.params
        return {table: {part: np.array(x[0]) for part, x in parts.items()} for table, parts in params.items()}

    def train(self, batches: np.ndarray, decay: float = 1.0) -> float:
        """One step for each row of batches; the mean loss of all."""
        rate = self.training.learning_rate * decay
        self.state, total, _ = self.programs.advance(self.state, self.keys, batches[None], self.done, rate, self.found)
        self.done += len(batches)
        return float(total[0]) / batches.size


# measurements


def settle(case: Case, family: str) -> tuple[Any, Any, Any]:
    """The family, the graph and the setting of a case."""
    from permjax.kge.graph import knowledge_graph
    from permjax.kge.models import FAMILIES as BY_NAME
    from permjax.kge.train import KgeTraining

    published = {"gamma": 1.0, "init_bound": 0.1, "learning_rate": 0.005} if case.dimension == 1024 else {}
    training = KgeTraining(batch_size=case.batch_size, **published)
    return BY_NAME[family](dimension=case.dimension), knowledge_graph(case.graph), training


def batches_of(case: Case, graph: Any) -> tuple[np.ndarray, list[tuple[Any, Any, Any]]]:
    """The same steps of one round for both sides."""
    import torch

    triples = graph.both_ways("train")
    ids = np.random.default_rng(0).permutation(len(triples))[: case.steps * case.batch_size]
    ids = ids.reshape(-1, case.batch_size).astype(np.int32)
    return ids, [tuple(torch.tensor(triples[rows]).long().T) for rows in ids]


def clock(f: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = f()
    return time.perf_counter() - begin, value


def measure_step(case: Case, family: str) -> dict[str, Any]:
    """Seconds per step of both sides, in turn."""
    cls, graph, training = settle(case, family)
    ours = OurSide(cls, graph, training)
    theirs = TorchSide(family, ours.tables(), training.gamma, training.learning_rate)
    rows, batches = batches_of(case, graph)
    first, loss = clock(lambda: ours.train(rows))
    difference = abs(theirs.train(batches) / loss - 1)
    ours_s, theirs_s = [], []
    for _ in range(case.rounds):
        ours_s.append(clock(lambda: ours.train(rows))[0] / len(rows))
        theirs_s.append(clock(lambda: theirs.train(batches))[0] / len(rows))
    step, other = median(ours_s), median(theirs_s)
    return {
        "seconds": step,
        "torch_seconds": other,
        "speedup": median(b / a for a, b in zip(ours_s, theirs_s, strict=True)),
        "triples_per_second": case.batch_size / step,
        "torch_triples_per_second": case.batch_size / other,
        "seconds_to_compile": first - len(rows) * step,
        "loss_difference": difference,
    }


def measure_evaluation(case: Case, family: str) -> dict[str, Any]:
    """Queries per second of both sides, in turn."""
    import jax

    from permjax.kge.queries import queries
    from permjax.kge.rank import model_scorer, rank_metrics, rank_queries

    cls, graph, training = settle(case, family)
    graph = dataclasses.replace(graph, test=graph.test[: case.tested])
    ours = OurSide(cls, graph, training)
    theirs = TorchSide(family, ours.tables(), training.gamma, training.learning_rate)
    known: dict[tuple[int, int], list[int]] = {}
    for split in graph.splits:
        for head, relation, tail in graph.both_ways(split).tolist():
            known.setdefault((head, relation), []).append(tail)
    params, triples = jax.tree.map(lambda x: x[0], ours.state.params), graph.both_ways("test")
    layout, asked = clock(lambda: queries(graph, "test"))

    def ours_mrr() -> float:
        return rank_metrics(rank_queries(model_scorer(cls, params, graph), asked), "pessimistic")["mrr"]

    first, _ = clock(ours_mrr)
    ours_s, theirs_s = [], []
    for _ in range(3 if case.dimension == 1024 else 7):
        seconds, found = clock(ours_mrr)
        ours_s.append(seconds / len(triples))
        seconds, expected = clock(lambda: theirs.mrr(triples, known, case.batch_size))
        theirs_s.append(seconds / len(triples))
    return {
        "queries_per_second": 1 / median(ours_s),
        "torch_queries_per_second": 1 / median(theirs_s),
        "speedup": median(b / a for a, b in zip(ours_s, theirs_s, strict=True)),
        "seconds_to_compile": first - len(triples) * median(ours_s),
        "seconds_to_lay_out": layout,
        "mrr_difference": abs(found - expected),
    }


def measure_memory(case: Case, family: str, side: str) -> dict[str, Any]:
    """The largest memory of one side while it trains."""
    cls, graph, training = settle(case, family)
    if side == "permjax":
        ours = OurSide(cls, graph, training)
        ids = np.random.default_rng(0).integers(0, len(ours.found.heads), (case.steps, case.batch_size))
        ours.train(ids.astype(np.int32))
    else:
        draw = np.random.default_rng(0)
        shapes = {"entity": cls.entity_shapes(), "relation": cls.relation_shapes()}
        sizes = {"entity": graph.size, "relation": 2 * len(graph.relations)}
        tables = {
            table: {part: draw.random((sizes[table], *shape), np.float32) / 10 for part, shape in parts.items()}
            for table, parts in shapes.items()
        }
        theirs = TorchSide(family, tables, training.gamma, training.learning_rate)
        del tables
        theirs.train(batches_of(case, graph)[1])
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)}


# time to a mean reciprocal rank


def time_ours(graph: Any, family: Any, training: Any, target: float) -> dict[str, Any]:
    """Train until the target is reached, with compilation and a second time without."""
    import jax

    from permjax.kge.batches import order
    from permjax.kge.rank import rank_metrics, rank_model

    times = {}
    for name in ("seconds", "warm_seconds"):
        spent, side = clock(lambda: OurSide(family, graph, training))
        reached, epoch, count = 0.0, 0, len(side.found.heads)
        while reached < target and epoch < LONGEST:
            for _ in range(EVERY):
                rows = order(0, epoch, count, training.batch_size)
                begin = time.perf_counter()
                side.train(rows, training.decay**epoch)
                spent += time.perf_counter() - begin
                epoch += 1
            params = jax.tree.map(lambda x: x[0], side.state.params)
            reached = rank_metrics(rank_model(family, params, graph))["mrr"]
        times[name] = spent
    return {**times, "epochs": epoch, "mrr": reached}


def time_pykeen(graph: Any, target: float) -> dict[str, Any]:
    """The same with PyKEEN's ComplEx."""
    import logging

    import torch
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import ComplEx
    from pykeen.training import LCWATrainingLoop
    from pykeen.triples import CoreTriplesFactory

    logging.disable(logging.WARNING)
    train, valid, test = (torch.tensor(split).long() for split in graph.splits.values())
    sizes = {"num_entities": graph.size, "num_relations": len(graph.relations)}
    factory = CoreTriplesFactory(train, **sizes, create_inverse_triples=True)
    model = ComplEx(triples_factory=factory, embedding_dim=64, loss="softplus", random_seed=0)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    loop = LCWATrainingLoop(model=model, triples_factory=factory, optimizer=adam)
    quiet = {"batch_size": 64, "use_tqdm": False, "use_tqdm_batch": False}
    spent, reached, epoch = 0.0, 0.0, 0
    while reached < target and epoch < LONGEST:
        more = {"num_epochs": epoch + EVERY, "continue_training": epoch > 0}
        begin = time.perf_counter()
        loop.train(factory, **more, **quiet)
        spent += time.perf_counter() - begin
        epoch += EVERY
        known = {"additional_filter_triples": [train, valid], "use_tqdm": False, "batch_size": 256}
        found = RankBasedEvaluator().evaluate(model, test, **known)
        reached = found.get_metric("both.realistic.inverse_harmonic_mean_rank")
    return {"seconds": spent, "epochs": epoch, "mrr": reached}


def measure_pykeen(case: Case) -> dict[str, Any]:
    """Both sides, one after the other."""
    from permjax.kge.vectors import Complex

    nfe_1, graph, training = settle(case, "nfe_1")
    target = TARGETS[case.graph]
    same = dataclasses.replace(training, gamma=0.0)
    rows = {
        "target": target,
        "permjax": time_ours(graph, Complex(64), same, target),
        "permjax_nfe_1": time_ours(graph, nfe_1, dataclasses.replace(training, gamma=1.0, init_bound=0.1), target),
        "pykeen": time_pykeen(graph, target),
    }
    slow, ours = rows["pykeen"]["seconds"], rows["permjax"]
    return {**rows, "speedup": slow / ours["seconds"], "speedup_warm": slow / ours["warm_seconds"]}


# all of it


def fresh(args: argparse.Namespace, *job: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    threads = str(args.threads)
    pins = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(pins, threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, f"--threads={threads}", "--job", *job]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    print(*job, done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def whole(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for."""
    rows: dict[str, Any] = {"step": {}, "evaluation": {}, "peak_gib": {}}
    for case in args.cases:
        for family in FAMILIES:
            name = f"{case} {family}"
            rows["step"][name] = fresh(args, "step", case, family)
            rows["evaluation"][name] = fresh(args, "evaluation", case, family)
            if CASES[case].dimension >= 1024:  # smaller ones do not show beside the imports
                peaks = {side: fresh(args, "memory", case, family, side)["peak_gib"] for side in ("permjax", "torch")}
                rows["peak_gib"][name] = {**peaks, "ratio": peaks["permjax"] / peaks["torch"]}
    if args.pykeen and find_spec("pykeen"):
        rows["pykeen"] = {case: fresh(args, "pykeen", case) for case in args.cases if case in TARGETS}
    return rows


def measure(threads: int, kind: str, case: str, *more: str) -> dict[str, Any]:
    """One measurement, in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    jobs = {"step": measure_step, "evaluation": measure_evaluation, "memory": measure_memory, "pykeen": measure_pykeen}
    return jobs[kind](CASES[case], *more)


def rounded(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: rounded(value) for name, value in row.items()}
    return float(f"{row:.4g}") if isinstance(row, float) else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pykeen", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args.threads, *args.job)))
        return
    packages = [name for name in ("jax", "jaxlib", "numpy", "torch", "pykeen") if find_spec(name)]
    setting = {"threads": args.threads, "machine": platform.machine(), "cores": os.cpu_count()}
    setting |= {"versions": {name: version(name) for name in packages}, "aims": AIMS}
    setting |= {"cases": {name: dataclasses.asdict(CASES[name]) for name in args.cases}}
    rows = rounded(whole(args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, **rows}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
