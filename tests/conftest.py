"""One house for all tests: CPU with four virtual devices, strict arrays, checked annotations."""

import dataclasses
import gc
import inspect
import os
import resource
import tempfile
import typing
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

# Thousands of small programs are compiled here and run a few times each: half of all time, if optimised for speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1",
)

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, install_import_hook, jaxtyped

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many programs are made again by other functions: every process compiles a program only once.
COMPILED = tempfile.TemporaryDirectory(prefix="permjax-compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def names_shapes(hint) -> bool:
    """Tell whether a jaxtyping array is part of an annotation, or may be, as it is quoted."""
    quoted_or_shaped = isinstance(hint, str) or type(hint).__module__.startswith("jaxtyping")
    return quoted_or_shaped or any(map(names_shapes, typing.get_args(hint)))


def checked(*, typechecker):
    """`jaxtyped` where shapes are named; elsewhere beartype alone checks as much, at a fraction of the cost."""
    alone = beartype(conf=BeartypeConf(violation_type=TypeCheckError))

    def decorate(it):
        if dataclasses.is_dataclass(it) and inspect.isfunction(vars(it).get("__init__")):
            it.__init__ = decorate(it.__init__)
            return it
        if inspect.isfunction(it) and not inspect.isgeneratorfunction(it):
            own_class = it.__qualname__.split(".")[:-1]
            if not any(names_shapes(hint) for hint in it.__annotations__.values() if hint not in own_class):
                return alone(it)
        return jaxtyped(it, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = checked  # what the hook calls
install_import_hook("permjax", "beartype.beartype")  # before the first import of permjax

from permjax.symmetry.spec import Fixed, Group, Leaf, Of, PermutationSpec, Product, Sum  # noqa: E402

hypothesis.settings.register_profile("permjax", deadline=None, max_examples=10, derandomize=True)
hypothesis.settings.load_profile("permjax")

TESTS = Path(__file__).parent
_PEAK = {"at the last clearing": 0}  # KiB
STRICT_FOLDERS = {"symmetry", "match", "merge", "lmc", "lora"}
STRICT_FILES = {f"test_{floor}.py" for floor in ("tree", "permutation", "plan", "action", "files", "steps")}


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No silent change of dtype in the floors and the methods; optax and flax need the standard rules."""
    first, *_ = request.path.relative_to(TESTS).parts
    if first in STRICT_FOLDERS or first in STRICT_FILES:
        with jax.numpy_dtype_promotion("strict"):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def bounded_memory():
    """Forget compiled programs whenever they and all else have made the process grow by another GiB."""
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak > _PEAK["at the last clearing"] + (1 << 20):
        jax.clear_caches()
        _PEAK["at the last clearing"] = peak


def pytest_collection_finish(session):
    """Modules stay until the end: spare the garbage collector from looking through them again and again."""
    gc.collect()
    gc.freeze()


# A small zoo of symmetries, one for each way in which groups stand in leaves.

H, D, E, L, F = (Of(name) for name in ("head", "qk", "vo", "layer", "ff"))


def by_hand(groups: dict, leaves: dict, indices: dict | None = None) -> PermutationSpec:
    """A spec from `group -> (size, per)`, `leaf -> axes` and `index group -> size`."""
    every = [Group(name, size, per) for name, (size, per) in groups.items()]
    fixed = [Group(name, size) for name, size in (indices or {}).items()]
    sizes = PermutationSpec((*every,), (), (*fixed,))
    found = [Leaf(name, tuple(sizes.size(a) for a in axes), tuple(axes)) for name, axes in leaves.items()]
    return PermutationSpec((*every,), (*found,), (*fixed,))


ZOO = {
    "mlp": PermutationSpec.from_axes(
        {"a/kernel": (3, 5), "a/bias": (5,), "b/kernel": (5, 4), "b/mean": (4,), "c/kernel": (4, 2)},
        {
            "a/kernel": (None, "h0"),
            "a/bias": ("h0",),
            "b/kernel": ("h0", "h1"),
            "b/mean": ("h1",),
            "c/kernel": ("h1", None),
        },
        roles={"b/mean": "statistic"},
    ),
    "same group on two axes": by_hand(
        {"h": (5, ())}, {"square": (Of("h"), Of("h")), "cube": (Of("h"), Fixed(2), Of("h")), "bias": (Of("h"),)}
    ),
    "attention, fused and split": by_hand(
        {"head": (3, ()), "qk": (4, ("head",)), "vo": (2, ("head",)), "res": (3, ())},
        {
            "fused": (Of("res"), Sum((Product((H, D)), Product((H, D)), Product((H, E))))),
            "bias": (Sum((Product((H, D)), Product((H, D)), Product((H, E)))),),
            "split": (Of("res"), H, D),
            "minor first": (D, Of("res"), H),
            "out": (Product((H, E)), Of("res")),
            "scale": (H,),
        },
    ),
    "stacked layers": by_hand(
        {"ff": (4, ("layer",)), "head": (3, ("layer",)), "vo": (2, ("layer", "head")), "res": (3, ())},
        {
            "up": (L, Of("res"), F),
            "down": (L, F, Of("res")),
            "value": (L, Of("res"), Product((H, E))),
            "out": (Product((L, H)), E, Of("res")),
            "table": (Product((L, H, E)), Fixed(2)),
        },
        {"layer": 3},
    ),
    "concatenation and grouped channels": by_hand(
        {"a": (3, ()), "b": (4, ()), "in group": (2, ("b",))},
        {
            "dense": (Fixed(2), Sum((Of("a"), Fixed(2), Of("b")))),
            "depthwise": (Product((Of("b"), Of("in group"))), Fixed(3)),
            "nested": (Product((Product((Of("b"), Fixed(2))), Of("in group"))), Of("a")),
        },
    ),
    "dependent axis before its outer axis": by_hand(
        {"head": (3, ()), "qk": (4, ("head",)), "vo": (2, ("head",)), "kv": (3, ()), "q in kv": (2, ("kv",))},
        {
            "w": (D, Product((H, E))),
            "cross": (Product((H, Fixed(2))), D),
            "circle": (Product((H, Of("q in kv"))), Product((Of("kv"), D))),
        },
    ),
    "outer groups in another order": by_hand(
        {"x": (2, ()), "y": (3, ()), "mid": (4, ("y", "x")), "in": (3, ("x", "y", "mid"))},
        {"w": (Of("x"), Of("y"), Of("mid"), Of("in")), "v": (Product((Of("y"), Of("x"), Of("mid"))), Of("in"))},
    ),
}


@pytest.fixture(scope="session", params=ZOO)
def zoo_spec(request) -> PermutationSpec:
    """Every symmetry of the zoo in turn."""
    return ZOO[request.param]


@pytest.fixture(scope="session")
def zoo():
    """All symmetries of the zoo by name."""
    return ZOO


@pytest.fixture(scope="session")
def draw_params():
    """`draw_params(spec, seed, backend)`: leaves of normal random numbers, by name."""

    def draw(spec: PermutationSpec, seed: int = 0, backend=np):
        rng = np.random.default_rng(seed)
        return {leaf.name: backend.asarray(rng.standard_normal(leaf.shape, np.float32)) for leaf in spec.leaves}

    return draw


@pytest.fixture(scope="session")
def draw_permutations():
    """`draw_permutations(spec, seed)`: random permutations in NumPy, made without permjax."""

    def draw(spec: PermutationSpec, seed: int = 0):
        rng = np.random.default_rng(seed)
        start = {g.name: np.broadcast_to(np.arange(g.size, dtype=np.int32), spec.shape(g.name)) for g in spec.groups}
        return {name: rng.permuted(rows, axis=-1) for name, rows in start.items()}

    return draw
