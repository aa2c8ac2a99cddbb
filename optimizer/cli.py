"""The command line: arguments in, results on stdout, everything else on stderr, an exit code.

It imports nothing heavy: each command loads what it runs. What a command does stands elsewhere.
"""

from __future__ import annotations

import gc
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, OptcError, quoted

if TYPE_CHECKING:
    from optc.specs.check import CheckedSpec

EXIT_CODES = """Exit codes: 0 done, and all that was asked for holds; 1 optc, its environment or a
build failed; 2 the spec, the model, an argument or an input is at fault; 3 a verification or gate
was not met; 130 stopped by Ctrl-C."""

app = typer.Typer(
    help=f"Compile ONNX models to TensorRT engines and the runtime around them, as a spec asks.\n\n"
    f"{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Device(StrEnum):
    """Where a package runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


SpecArgument = Annotated[
    Path, typer.Argument(metavar="SPEC", help="The spec file: what to compile, and how.")
]
PackageArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A package, as `optc compile` writes it.")
]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="NAME", help="Only this target of the spec; may be repeated."),
]
StageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stage",
        metavar="NAME",
        help="Only this scope of the spec, as a package of its own; may be repeated.",
    ),
]
DisableOption = Annotated[
    list[str] | None,
    typer.Option("--disable", metavar="PASS", help="A pass not to run; may be repeated."),
]

DumpOption = Annotated[
    str | None,
    typer.Option(
        "--dump-after",
        metavar="PASS",
        help="Save the graph after each step of this pass, beside the output in <output>.dump; "
        "`all` for every pass.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        from optc import __version__

        print(f"optc {__version__}")
        raise typer.Exit


def _tolerance(value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:  # NaN too: it would let anything pass
        raise typer.BadParameter(f"{value} is not a finite number of at least 0")
    return value


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_(
    specs: Annotated[
        list[Path], typer.Argument(metavar="SPEC...", help="Spec files: what to compile, and how.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Where the package goes; with several specs or stages, the folder of their packages. "
            " [default: build/<spec name>, build/<spec name>-<stage>]",
        ),
    ] = None,
    target: TargetOption = None,
    stage: StageOption = None,
    dump_after: DumpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile the model of each SPEC to a package that runs.

    Writes engines, the stages as ONNX, manifest and report; then holds the package against the
    original model where the spec has `verify:` (else one quick run), and against `gate:`.
    """
    results: list[dict[str, Any]] = []
    codes: list[int] = []
    for spec, name, folder in _with_outputs(specs, stage or (), output):

        def one(spec: Path = spec, name: str | None = name, folder: Path = folder) -> None:
            checked = _checked(spec)
            from optc.optimizer.compile import compile_package
            from optc.optimizer.progress import progress

            with progress(str(spec)) as shown:
                outcome = compile_package(
                    checked,
                    folder,
                    targets=target or (),
                    stage=name,
                    dump_after=dump_after,
                    progress=shown,
                )
            results.append(outcome.as_json())
            if not as_json:
                outcome.print()
            _tell(outcome.diagnostics)
            codes.append(outcome.exit_code)

        code, problems = _attempt(one)
        if problems:
            codes.append(code)
            results.append(_failure(spec, problems))
    if as_json:
        _print_json(results[0] if len(results) == 1 else {"results": results})
    raise typer.Exit(_worst(codes))


@app.command()
def plan(
    spec: SpecArgument,
    target: TargetOption = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="Only this scope of the spec, on its own."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Build no engine on trial; what no build confirmed is `unconfirmed`."
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say of each cut what forces it and what crosses, and what would be saved if what "
            "was refused were supported.",
        ),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.svg", help="Draw the stages to this file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what compiling SPEC would do, stage by stage, and why.

    Engines are built on trial, as only a build can tell what TensorRT takes. What it said of single
    nodes is kept in optc's cache.
    """

    _can_be_written(".svg", picture, "--picture")

    def one() -> None:
        checked = _checked(spec)
        from optc.optimizer.compile import plan_package
        from optc.optimizer.progress import progress

        with progress(str(spec)) as shown:
            planned = plan_package(
                checked,
                targets=target or (),
                stage=stage,
                build=not quick,
                explain=explain,
                progress=shown,
            )
        if picture is not None:
            _write_picture(picture, planned.picture)
        if as_json:
            _print_json(planned.as_json())
        else:
            planned.print()
        _tell(planned.diagnostics)

    _run(one, spec if as_json else None)


@app.command()
def run(
    folder: PackageArgument,
    inputs: Annotated[
        Path, typer.Option("--inputs", metavar="IN.npz", help="One array an input, by its name.")
    ],
    outputs: Annotated[
        Path, typer.Option("--outputs", metavar="OUT.npz", help="Where the outputs go.")
    ],
    device: Annotated[
        Device,
        typer.Option(
            help="`auto`: engines where this machine has the target's GPU, else each stage's ONNX on "
            "ONNX Runtime."
        ),
    ] = Device.auto,
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="Which target's stages to run.")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            "--costs",
            metavar="FILE.json",
            help="Time the stages, and write what that tells of this machine to this file, for "
            "`partition.cost.measured` of a spec.",
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat",
            metavar="N",
            min=1,
            help="How many runs `--costs` times, after two that warm up.  [default: 10]",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a package on the arrays of an npz file.

    Says for each stage where it ran.
    """
    if repeat is not None and costs is None:
        raise typer.BadParameter("it says how often to run for `--costs`", param_hint="--repeat")
    _can_be_written(".json", costs, "--costs")
    if outputs.resolve() == inputs.resolve():
        raise typer.BadParameter("that is the file of the inputs", param_hint="--outputs")

    def one() -> None:
        from optc.optimizer.arrays import read_arrays, write_arrays
        from optc.optimizer.runtime import load

        package, given = load(folder), read_arrays(inputs)
        results = package.run(given, target=target, device=device.value)
        write_arrays(outputs, results)
        report = package.last_run
        assert report is not None, "run() leaves a report"
        document: dict[str, Any] = {**report.as_json(), "outputs": str(outputs)}
        lines = [report.render(), f"outputs: {outputs}"]
        if costs is not None:
            from optc.optimizer.cost_fit import measure, render, write_costs

            measured = measure(
                package, given, target=target, device=device.value, repeat=repeat or 10
            )
            write_costs(costs, measured)
            document["costs"] = {"file": str(costs), **measured.model_dump(mode="json")}
            lines += [render(measured), f"costs: {costs}"]
        if as_json:
            _print_json(document)
        else:
            print("\n".join(lines))

    _run(one, folder if as_json else None)


@app.command()
def verify(
    folder: PackageArgument,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="The original model.  [default: where the spec found it]",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="GLOB",
            help="npz files of inputs to verify with, in place of the spec's and of its groups; may "
            "be repeated.",
        ),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option(
            callback=_tolerance,
            help="Absolute tolerance, in place of all that the spec asks of numbers.",
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            callback=_tolerance,
            help="Relative tolerance, likewise; of the two, one not given is the spec's, else 1e-4.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a package against the original model, output by output.

    Runs both at the least, best and largest shapes of every optimisation profile on made-up input,
    and on your data. Where neither the spec nor an option says how exact an output must be, the
    default of the package's precision holds. What differs no more than the original model does when
    its own rounding is stirred is reported as such and does not fail.
    """

    def one() -> None:
        from optc.optimizer.compile import verify_package
        from optc.optimizer.progress import progress

        with progress(str(folder)) as shown:
            verification = verify_package(
                folder, model=model, data=data, atol=atol, rtol=rtol, progress=shown
            )
        if as_json:
            _print_json(verification.as_json())
        else:
            print(verification.render())
        _tell(verification.diagnostics)
        raise typer.Exit(verification.exit_code)

    _run(one, folder if as_json else None)


@app.command()
def optimize(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Where the optimised model goes.")
    ],
    disable: DisableOption = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="PASS",
            help="Run this pass and no other; may be repeated. One that legalises runs on all nodes "
            "that it knows.",
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove",
            help="Run the model before and after each step on made-up input of several shapes. The "
            "first step that changes an output beyond the model's own noise ends it, with the node, "
            "and OUT.not-proven holds what shows it again.",
        ),
    ] = False,
    print_after: Annotated[
        str | None,
        typer.Option(
            "--print-after",
            metavar="PASS",
            help="Print the graph to stderr after each step of this pass; `all` for every pass.",
        ),
    ] = None,
    dump_after: DumpOption = None,
    stop_after: Annotated[
        int | None,
        typer.Option(
            "--stop-after",
            metavar="N",
            min=0,
            help="Stop after N steps, that is runs of a pass that change something.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the graph passes alone on MODEL. No spec, no TensorRT."""

    def one() -> None:
        from optc.optimizer.optimize import Looking, optimize_file
        from optc.optimizer.progress import progress

        looking = Looking(print_after, dump_after, stop_after, prove)
        with progress(str(model)) as shown:
            report = optimize_file(
                model,
                output,
                disable=disable or (),
                only=only or (),
                looking=looking,
                progress=shown,
            )
        if as_json:
            _print_json(report.as_json())
        else:
            print(report.render())

    _run(one, model if as_json else None)


@app.command()
def passes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[PASS]", help="Show all there is to know of this pass."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the passes in running order, with what each does; or explain one."""

    def one() -> None:
        from optc.passes import registry

        if name is not None:
            registry.require(name)
        found = [registry.load(each) for each in ([name] if name else registry.names())]
        if as_json:
            documents = [each.as_json() for each in found]
            _print_json(documents[0] if name else documents)
        elif name:
            print(found[0].explanation())
        else:
            width = max(len(each.name) for each in found)
            for each in found:
                print(f"{each.name:<{width}}  {each.summary()}")

    _run(one)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec, for editors and for programs that write specs."""

    def one() -> None:
        from optc.specs.compile_spec import json_schema

        _print_json(json_schema())

    _run(one)


@app.command()
def init(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where the spec goes.  [default: stdout]"
        ),
    ] = None,
) -> None:
    """Write a spec to start from, with the inputs and dynamic axes that MODEL really has."""

    def one() -> None:
        from optc.optimizer.init import starter, write_new

        text = starter(model, beside=output)
        if output is None:
            print(text, end="")
            return
        write_new(output, text)
        print(f"wrote {output}; next: optc compile {output}")

    _run(one)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can build and run."""

    def one() -> None:
        from optc.optimizer.doctor import examine

        report = examine()
        if as_json:
            _print_json(report.as_json())
        else:
            print(report.render())

    _run(one)


# --- how a command ends --------------------------------------------------------------------------


def _with_outputs(
    specs: Sequence[Path], stages: Sequence[str], output: Path | None
) -> list[tuple[Path, str | None, Path]]:
    """Return each spec, with each stage that is asked for, and the folder of its package."""
    meant = [(spec, stage) for spec in specs for stage in dict.fromkeys(stages or (None,))]
    if output is not None and len(meant) == 1:
        return [(*meant[0], output)]
    base = output or Path("build")
    found = [
        (spec, stage, base / (spec.stem if stage is None else f"{spec.stem}-{stage}"))
        for spec, stage in meant
    ]
    folders = [folder for _, _, folder in found]
    twice = {folder for folder in folders if folders.count(folder) > 1}
    if twice:
        names = quoted(str(spec) for spec, _, folder in found if folder in twice)
        _end(
            InputError(
                Diagnostic(
                    "same-output",
                    f"{names} would be written to one folder, `{min(twice)}`",
                    "compile them one by one with `-o`, or give the spec files names of their own",
                )
            )
        )
    return found


def _checked(spec: Path) -> CheckedSpec:
    """Check ``spec`` before anything heavy is imported: a mistake is told at once."""
    from optc.passes import registry
    from optc.specs.check import check

    checked = check(spec, known_passes=registry.names, options_of=registry.options_of)
    gc.enable()  # what follows takes its time
    return checked


def _can_be_written(suffix: str, path: Path | None, option: str) -> None:
    """Make sure of a file before the work that fills it: its folder is there, its kind is right.

    What it replaces shall not, by mistake, be of another kind.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"the name has to end in `{suffix}`", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder `{path.parent}`", param_hint=option)


def _write_picture(path: Path, picture: str) -> None:
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            Diagnostic(
                "cannot-write",
                f"`{path}` cannot be written: {error.strerror}",
                "make room, or choose another folder",
            )
        ) from error


def _attempt(action: Callable[[], None]) -> tuple[int, tuple[Diagnostic, ...]]:
    """Run ``action``; return exit code and diagnostics where it raised one of our errors."""
    try:
        action()
    except OptcError as error:
        _tell(error.diagnostics)
        return error.exit_code, error.diagnostics
    except KeyboardInterrupt:  # typer would make an exit code of 1 of it
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    return 0, ()


def _run(action: Callable[[], None], json_for: Path | None = None) -> None:
    """Run ``action`` and exit as its error asks; with ``json_for`` the error is told as JSON too."""
    gc.enable()
    code, problems = _attempt(action)
    if problems and json_for is not None:
        _print_json(_failure(json_for, problems))
    if code:
        raise typer.Exit(code)


def _failure(what: Path, problems: Sequence[Diagnostic]) -> dict[str, Any]:
    return {"ok": False, "input": str(what), "diagnostics": [p.as_json() for p in problems]}


def _worst(codes: Sequence[int]) -> int:
    """Return the code of several: a failure of ours weighs more than the user's, that than a gate."""
    return next((code for code in (1, 2, 3) if code in codes), 0)


def _tell(problems: Sequence[Diagnostic]) -> None:
    for problem in problems:
        print(problem.render(), file=sys.stderr)


def _print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def _end(error: OptcError) -> NoReturn:
    _tell(error.diagnostics)
    raise typer.Exit(error.exit_code)


def main() -> None:
    """Run the command line and exit."""
    # Asked to end, it ends as any error ends it: what is half done is removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda given, frame: sys.exit(128 + given))
    # What answers at once makes no garbage worth the search; _checked() and _run() turn it on.
    gc.disable()
    try:
        app()
    except BrokenPipeError:  # the reader of our output is gone, as `optc passes | head -1` does
        sys.stderr.close()
        sys.exit(1)
