"""Which passes there are, and in which order they run.

A built-in pass is one line in `ORDER`: its file and class are named by the same words. Other
distributions add passes by the entry-point group ``optc.passes``; theirs run after ours. Names are
known without importing a pass, so that a spec is checked fast.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, nearest

if TYPE_CHECKING:
    from optc.passes.contract import Pass

ENTRY_POINT_GROUP = "optc.passes"

Options = Mapping[str, Mapping[str, Any]]
"""Name of a pass -> name of an option -> its value."""

ORDER = (
    "remove-dead",
    "fold-constants",
    "inline-constant-if",
    "unroll-loop",
    "remove-identities",
    "trim-bodies",
    "hoist-from-loops",
    "remove-casts-of-whole-numbers",
    "narrow-doubles",
    "remove-zero-states",
    "fill-final-shape",
    "fold-shapes",
    "remove-expands",
    "push-transposes",
    "merge-reshapes",
    "merge-concats",
    "merge-slices",
    "merge-common-subexpressions",
    "fold-batchnorm-into-conv",
    "fold-batchnorm-into-gemm",
    "fold-mul-into-conv",
    "fold-add-into-conv",
    "fold-mul-into-gemm",
    "fold-add-into-gemm",
    "fuse-clip",
    "fuse-hard-swish",
    "fuse-hard-sigmoid",
    "fuse-gelu",
    "fuse-mish",
    "fuse-softmax",
    "fuse-instance-normalization",
    "fuse-layer-normalization",
    "fuse-rms-normalization",
    "fuse-matmul-add-into-gemm",
    "fuse-transpose-into-gemm",
    "fold-affine-into-batchnorm",
    "fold-affine-into-filled-conv",
    "fold-batchnorm-before-conv",
    "fold-batchnorm-before-gemm",
    "fold-add-before-conv",
    "fold-add-before-gemm",
    "fold-mul-before-conv",
    "fold-mul-before-gemm",
    "move-scale-into-weights",
    "fold-pad-into-conv",
    "fold-constant-chains",
)
"""Built-in passes in running order: what makes the graph smaller comes before what searches it.

Those that fold what comes before a Conv or Gemm end the list: fused activations and normalisations
are looked for before the Div, Mul or Add that ends one is gone.
"""

LEGALISING: tuple[str, ...] = (
    "take-reduction-out-of-scatters",
    "turn-resizes-into-products",
    "decompose-col2im",
    "decompose-affine-grid",
    "decompose-max-pool",
    "turn-average-pools-into-convs",
    "compute-bits-in-integers",
    "select-after-concat",
    "inline-if-not-empty",
    "fill-axes-before-gathers",
    "decompose-non-max-suppression",
    "decompose-non-zero",
    "decompose-compress",
    "decompose-max-unpool",
    "decompose-dft",
    "decompose-det",
    "expand-functions",
    "decompose-roi-align",
    "decompose-deform-conv",
    "give-vectors-a-row",
    "turn-products-into-convs",
    "expand-dynamic-quantisation",
    "make-zero-points-zero",
    "expand-quantised-operators",
    "carry-bytes-in-floats",
    "expand-fused-operators",
    "expand-attention",
    "dequantise-lstm",
)
"""Built-in passes that rewrite what a target refuses into what it takes. They run on those nodes only,
and what they make is kept where the target takes it."""

LOWERING: tuple[str, ...] = ("spell-out-activations", "quantise-products", "lower-floats")
"""Built-in passes that lower precision, in running order. They run once, on a stage that is to be
built, and do what they are told (`optc.passes.precision`)."""

OPENING: tuple[str, ...] = ("open-branches",)
"""Built-in passes that take out of bodies what no target takes there. They run once, on what is named to
them (`optc.optimizer.hoist`)."""

BUILT_IN = (*ORDER, *LEGALISING, *LOWERING, *OPENING)


def _plugins() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for name in found.keys() & {*BUILT_IN}:
        raise _bad_plugin(found[name], "bears the name of a pass that is built in")
    return found


def names() -> tuple[str, ...]:
    """Return the names of all passes, built-in ones first, in running order."""
    return (*BUILT_IN, *(name for name in _plugins() if name not in BUILT_IN))


def load(name: str) -> type[Pass]:
    """Return the class of the pass called ``name``.

    Raises:
        KeyError: If there is none.
        EnvironmentFault: If a plugin's entry point cannot be used (code ``bad-plugin``).
    """
    if name in BUILT_IN:
        module = import_module(f"optc.passes.{name.replace('-', '_')}")
        found: type[Pass] = getattr(module, "".join(map(str.capitalize, name.split("-"))))
        return found
    return _load_plugin(_plugins()[name])


def _load_plugin(entry: EntryPoint) -> type[Pass]:
    from optc.passes.contract import Pass

    try:
        found = entry.load()
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise _bad_plugin(entry, f"cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise _bad_plugin(entry, "is no subclass of optc.passes.contract.Pass")
    if found.name != entry.name:
        raise _bad_plugin(entry, f"calls itself `{found.name}`, its entry point `{entry.name}`")
    return found


def _bad_plugin(entry: EntryPoint, problem: str) -> EnvironmentFault:
    return EnvironmentFault(
        Diagnostic(
            "bad-plugin",
            f"the pass `{entry.name}` ({entry.value}) {problem}",
            "mend or uninstall the distribution that brings it",
        )
    )


def require(name: str) -> None:
    """Make sure that there is a pass called ``name``.

    Raises:
        InputError: If there is none (``unknown-pass``).
    """
    known = names()
    if name not in known:
        guess = nearest(name, known)
        raise InputError(
            Diagnostic(
                "unknown-pass",
                f"there is no pass called `{name}`",
                (f"write `{guess}`, or " if guess else "") + "see all of them with `optc passes`",
            )
        )


def options_of(name: str) -> dict[str, tuple[type[object], float | None]]:
    """Return the options of the pass called ``name``: type and least value of each."""
    return {key: (option.type, option.least) for key, option in load(name).options().items()}


def passes(
    disable: Iterable[str] = (),
    *,
    only: Collection[str] = (),
    options: Options = MappingProxyType({}),
) -> list[Pass]:
    """Return the optimising passes in running order.

    Args:
        disable: Names of passes to leave out.
        only: Names of the passes to return, also of those that legalise; all where it is empty.
        options: Name of a pass -> its options.
    """
    left_out = {*disable, *LOWERING, *OPENING, *(() if only else LEGALISING)}
    wanted = [name for name in names() if name not in left_out and (not only or name in only)]
    found = [load(name)(**options.get(name, {})) for name in wanted]
    return [pass_ for pass_ in found if only or pass_.group not in ("legalise", "lower")]


def legalisers(disable: Iterable[str] = (), options: Options = MappingProxyType({})) -> list[Pass]:
    """Return the passes that legalise, without those named in ``disable``.

    Args:
        disable: Names of passes to leave out.
        options: Name of a pass -> its options.
    """
    left_out = {*disable, *ORDER, *LOWERING, *OPENING}
    found = [load(name)(**options.get(name, {})) for name in names() if name not in left_out]
    return [pass_ for pass_ in found if pass_.group == "legalise"]


def lowerers(options: Options = MappingProxyType({})) -> list[Pass]:
    """Return the passes that lower precision, in running order.

    Args:
        options: Name of a pass -> its options.
    """
    return [load(name)(**options.get(name, {})) for name in LOWERING]
