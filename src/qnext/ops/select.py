"""select: OpSpec -> Ops, with a reason for every refusal.

The order of preference of an op is the order in its family's ``IMPLS`` table; ``reference`` is
last and always fits. A backend that is asked for by name and does not fit is an error; one that is
merely preferred falls through, visibly, in ``Ops.report``.
"""

import os
from collections.abc import Mapping
from dataclasses import fields

from qnext.errors import BackendError
from qnext.ops import (
    attention,
    attention_native,
    conv,
    cross_entropy,
    delta_layer,
    elementwise,
    experts_native,
    gated_delta,
    linear,
    moe,
    norm,
    norm_native,
    rope,
    route,
    sparse_layer,
)
from qnext.ops.contracts import Impl, Ops, OpSpec, native_for_gradients, only_for_gradients

IMPLS: dict[str, tuple[Impl, ...]] = {
    **norm.IMPLS,
    "residual_norm": norm_native.IMPLS["residual_norm"],
    **linear.IMPLS,
    **elementwise.IMPLS,
    **rope.IMPLS,
    **conv.IMPLS,
    **gated_delta.IMPLS,
    **delta_layer.IMPLS,
    **attention.IMPLS,
    **moe.IMPLS,
    **sparse_layer.IMPLS,
    **route.IMPLS,
    **cross_entropy.IMPLS,
    "attention": (*attention_native.IMPLS["attention"], *attention.IMPLS["attention"]),
    "rms_norm_zero_centred": (
        *norm_native.IMPLS["rms_norm_zero_centred"],
        *norm.IMPLS["rms_norm_zero_centred"],
    ),
    "experts": (*experts_native.IMPLS["experts"], *moe.IMPLS["experts"]),
}
JOINED = {
    "residual_norm": ("rms_norm_zero_centred",),
    "delta_layer": ("causal_conv", "elementwise", "gated_delta_whole", "rms_norm_gated"),
    "sparse_layer": ("elementwise", "experts", "linear", "route"),
}
"""Ops that stand for several others: asking for one of those by name leaves them apart."""
OP_NAMES = tuple(item.name for item in fields(Ops) if item.name != "report")


def select(spec: OpSpec | None = None, prefer: Mapping[str, str] | None = None) -> Ops:
    """Choose an implementation for every op.

    ``prefer`` maps op names (or ``all``) to backend names and wins over ``QNEXT_OPS``, a comma
    separated list such as ``experts=reference,attention=torch``. Raises BackendError for an
    unknown word and for a named backend that does not fit.
    """
    spec = spec or OpSpec()
    wanted = {**_from_environment(), **(prefer or {})}
    for op in wanted:
        if op != "all" and op not in OP_NAMES:
            raise BackendError(
                f"unknown op {op!r}; expected 'all' or one of {', '.join(OP_NAMES)}."
            )
    chosen: dict[str, object] = {}
    report = []
    for op in OP_NAMES:
        name = wanted.get(op, wanted.get("all"))
        if op in JOINED and op not in wanted and (name or any(x in wanted for x in JOINED[op])):
            name = name if name == "native" else "reference"
        impl, refusals = _choose(op, spec, name, op in wanted)
        chosen[op] = impl.load()
        why = f" ({'; '.join(refusals)})" if refusals else ""
        report.append(f"{op}: {impl.backend}{why}")
    return Ops(**chosen, report=tuple(report))  # type: ignore[arg-type]


def invariant() -> dict[str, str]:
    """``prefer`` for path-independent results: every op whose rows would else see each other."""
    return {
        op: "invariant"
        for op, impls in IMPLS.items()
        if any(i.backend == "invariant" for i in impls)
    }


def _choose(op: str, spec: OpSpec, name: str | None, strict: bool) -> tuple[Impl, list[str]]:
    refusals: list[str] = []
    if name is not None:
        known = {impl.backend: impl for impl in IMPLS[op]}
        if name in known:
            reason = known[name].unfit(spec)
            if reason is None:
                return known[name], refusals
            raise BackendError(f"{op}={name}: {reason} Leave it out to choose automatically.")
        every = {impl.backend for impls in IMPLS.values() for impl in impls}
        if strict or name not in every:
            raise BackendError(f"{op}={name}: no such backend; {op} has {', '.join(known)}.")
        refusals.append(f"{name}: not written for this op")
    for impl in IMPLS[op]:
        reason = impl.unfit(spec)
        if reason is None:
            return impl, refusals
        # Nobody who serves asked why a training op does not run.
        if spec.grad or impl.unfit not in (only_for_gradients, native_for_gradients):
            refusals.append(f"{impl.backend}: {reason}")
    raise AssertionError(f"{op}: the reference must fit every spec, {spec}")


def _from_environment() -> dict[str, str]:
    wanted: dict[str, str] = {}
    for item in filter(None, os.environ.get("QNEXT_OPS", "").split(",")):
        op, equals, backend = item.strip().partition("=")
        if not equals:
            raise BackendError(
                f"QNEXT_OPS: expected op=backend, found {item.strip()!r}; for instance "
                "QNEXT_OPS=experts=reference."
            )
        wanted[op.strip()] = backend.strip()
    return wanted
