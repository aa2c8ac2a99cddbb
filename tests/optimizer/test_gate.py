from __future__ import annotations

from optc.optimizer.gate import check_gate
from optc.specs.compile_spec import Gate
from optc.specs.diagnostic import Diagnostic, Place
from optc.specs.manifest import (
    Crossing,
    Manifest,
    ModelRecord,
    Reason,
    SpecRecord,
    Stage,
    Target,
)

SPEC = {
    ("gate", "max_engines"): 20,
    ("gate", "min_tensorrt_flops"): 21,
    ("gate", "max_boundary_bytes"): 22,
}


def place(*keys: str | int) -> Place | None:
    line = SPEC.get(keys)  # type: ignore[call-overload]
    return None if line is None else Place("spec.yaml", line, 3)


def stage(number: int, runtime: str, share: float, *refused: tuple[str, str, str]) -> Stage:
    """Return a stage; ``refused`` are node, op and the one target they were refused on, or all."""
    return Stage(
        id=number,
        runtime=runtime,  # type: ignore[arg-type]
        model=f"stages/{number:02d}.onnx",
        inputs=(f"t{number}",),
        outputs=(f"t{number + 1}",),
        flops_share=share,
        why=tuple(
            Reason(node=node, op=op, by="parser", text="no", targets=(on,) if on else ())
            for node, op, on in refused
        ),
    )


def checked(
    gate: Gate,
    *stages: Stage,
    targets: dict[str, tuple[int, ...]],
    crossings: tuple[Crossing, ...] = (),
) -> list[Diagnostic]:
    manifest = Manifest(
        optc_version="0",
        spec=SpecRecord(sha256="0"),
        model=ModelRecord(path="m.onnx", sha256="0", bytes=1),
        inputs=(),
        outputs=(),
        stages=stages,
        targets=tuple(
            Target(name=name, backend="tensorrt-rtx", stages=ids, crossings=crossings)
            for name, ids in targets.items()
        ),
    )
    return check_gate(gate, manifest, place)


CUT = (
    stage(0, "tensorrt", 0.5),
    stage(1, "onnxruntime", 0.04, ("/dcn/a", "DeformConv", "")),
    stage(2, "tensorrt", 0.45),
    stage(3, "onnxruntime", 0.01, ("/n/a", "NonZero", ""), ("/n/b", "NonZero", "turing")),
    stage(4, "tensorrt", 1.0),
)


def test_a_gate_that_holds_says_nothing() -> None:
    gate = Gate(max_engines=2, min_tensorrt_flops=0.95)
    assert checked(gate, *CUT, targets={"ampere": (0, 1, 2, 3), "whole": (4,)}) == []


def test_a_gate_that_asks_for_nothing_holds() -> None:
    assert checked(Gate(), *CUT, targets={"ampere": (0, 1, 2, 3)}) == []


def test_too_many_engines_name_the_nodes_that_cut_them_apart() -> None:
    (problem,) = checked(Gate(max_engines=1), *CUT, targets={"ampere": (0, 1, 2), "whole": (4,)})
    assert problem.code == "gate-max-engines"
    assert problem.severity == "error"
    assert problem.problem == (
        "target `ampere` needs 2 engines, the gate allows 1; they are cut apart by stage 1 "
        "(4.00% of the FLOPs: DeformConv `/dcn/a`)"
    )
    assert problem.place == Place("spec.yaml", 20, 3)


def test_engines_cut_apart_by_points_alone_name_the_points() -> None:
    (problem,) = checked(Gate(max_engines=1), *CUT, targets={"ampere": (0, 2)})
    assert "no node is off TensorRT; the cuts are at `t1`" in problem.problem
    assert "partition.points" in str(problem.todo)


def test_too_little_in_tensorrt_names_the_largest_stage_first() -> None:
    gate = Gate(min_tensorrt_flops=0.96)
    (problem,) = checked(gate, *CUT, targets={"turing": (0, 1, 2, 3)})
    assert problem.code == "gate-min-tensorrt-flops"
    assert problem.problem == (
        "on target `turing` 95.00% of the FLOPs run in TensorRT, the gate asks for 96.00%; the "
        "rest is in stage 1 (4.00% of the FLOPs: DeformConv `/dcn/a`), stage 3 (1.00% of the "
        "FLOPs: 2 NonZero, first `/n/a`)"
    )
    assert problem.place == Place("spec.yaml", 21, 3)


def test_a_refusal_on_another_target_is_not_held_against_this_one() -> None:
    gate = Gate(min_tensorrt_flops=1.0)
    (problem,) = checked(gate, *CUT, targets={"ampere": (2, 3)})
    assert "stage 3 (1.00% of the FLOPs: NonZero `/n/a`)" in problem.problem


def test_every_target_is_held_to_it() -> None:
    gate = Gate(max_engines=1, min_tensorrt_flops=1.0)
    problems = checked(gate, *CUT, targets={"ampere": (0, 1, 2), "turing": (0, 3), "whole": (4,)})
    assert [p.code for p in problems] == [
        "gate-max-engines",
        "gate-min-tensorrt-flops",
        "gate-min-tensorrt-flops",
    ]


def test_shares_that_were_rounded_down_do_not_fail_a_gate_of_all() -> None:
    thirds = [stage(number, "tensorrt", 0.333333) for number in range(3)]
    assert checked(Gate(min_tensorrt_flops=1.0), *thirds, targets={"ampere": (0, 1, 2)}) == []


def test_a_package_without_engines_fails_a_gate_on_flops() -> None:
    only = stage(0, "onnxruntime", 1.0, ("n", "Unique", ""))
    (problem,) = checked(Gate(min_tensorrt_flops=0.5), only, targets={"ampere": (0,)})
    assert "0.00% of the FLOPs run in TensorRT" in problem.problem


def crossing(tensor: str, most: int | None, *readers: int) -> Crossing:
    """Return a tensor that stage 0 makes and the ``readers`` read."""
    return Crossing(
        tensor=tensor,
        maker=0,
        readers=readers,
        bytes=None if most is None else most // 2,
        most_bytes=most,
        boundaries=readers[-1],
    )


SENT = (crossing("a", 1000, 1), crossing("b", 400, 1, 3), crossing("c", 0, 1), crossing("d", 1, 1))


def test_bytes_count_at_their_most_and_at_every_boundary() -> None:
    gate = Gate(max_boundary_bytes=2201)
    assert checked(gate, *CUT, targets={"ampere": (0, 1, 2, 3)}, crossings=SENT) == []
    gate = Gate(max_boundary_bytes=2200)
    (problem,) = checked(gate, *CUT, targets={"ampere": (0, 1, 2, 3)}, crossings=SENT)
    assert problem.code == "gate-max-boundary-bytes"
    assert problem.severity == "error"
    assert problem.problem == (
        "on target `ampere` up to 2,201 bytes cross between stages in a call, the gate allows "
        "2,200 bytes: `b` (400 bytes x 3 boundaries, from stage 0 to 1 and 3), `a` (1,000 bytes, "
        "from stage 0 to 1), `d` (1 byte, from stage 0 to 1), 1 more"
    )
    assert problem.place == Place("spec.yaml", 22, 3)


def test_a_tensor_that_nothing_bounds_fails_any_gate_on_bytes() -> None:
    unbounded = tuple(crossing(f"u{number}", None, 1) for number in range(5))
    gate = Gate(max_boundary_bytes=10**12)
    (problem,) = checked(gate, *CUT, targets={"ampere": (0, 1)}, crossings=(*SENT, *unbounded))
    assert problem.code == "gate-max-boundary-bytes"
    assert "nothing bounds the bytes of `u0`, `u1`, `u2` and 2 more" in problem.problem
    assert "`dims`" in str(problem.todo)
    assert problem.place == Place("spec.yaml", 22, 3)


def test_a_model_in_one_stage_sends_nothing() -> None:
    gate = Gate(max_boundary_bytes=0)
    assert checked(gate, *CUT, targets={"whole": (4,)}) == []
