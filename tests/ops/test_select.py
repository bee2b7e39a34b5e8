"""select: the choice of kernels is a value, with a reason for every refusal."""

import dataclasses

import pytest
import torch

from qnext import native
from qnext.errors import BackendError
from qnext.ops import Ops, OpSpec, select
from qnext.ops.contracts import BOUNDS, Impl
from qnext.ops.select import IMPLS, OP_NAMES


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("QNEXT_OPS", raising=False)


class TestTables:
    def test_every_op_has_implementations_a_reference_last_and_a_bound(self):
        assert set(OP_NAMES) == set(IMPLS) == set(BOUNDS)
        for op, impls in IMPLS.items():
            assert impls[-1].backend == "reference", op
            assert len({impl.backend for impl in impls}) == len(impls), op

    @pytest.mark.parametrize(
        "spec",
        [OpSpec(), OpSpec(dtype=torch.bfloat16, grad=True), OpSpec(device="cuda", grad=True)],
        ids=str,
    )
    def test_reference_fits_every_spec(self, spec):
        assert all(impls[-1].unfit(spec) is None for impls in IMPLS.values())


class TestDefault:
    def test_first_fitting_implementation_runs(self):
        ops = select()
        for op in OP_NAMES:
            fitting = [impl for impl in IMPLS[op] if impl.unfit(OpSpec()) is None]
            assert getattr(ops, op) is fitting[0].load()

    def test_report_has_one_line_per_op(self):
        report = select().report
        assert [line.split(":")[0] for line in report] == list(OP_NAMES)
        assert "gated_delta_chunk: torch" in report
        assert "apply_rope: reference" in report

    def test_the_choice_cannot_be_changed_afterwards(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            select().attention = None

    def test_ops_is_the_public_type(self):
        assert isinstance(select(OpSpec()), Ops)


class TestPreference:
    def test_one_op(self):
        ops = select(prefer={"experts": "reference"})
        assert "experts: reference" in ops.report
        assert "attention: torch" in ops.report

    def test_all_ops(self):
        ops = select(prefer={"all": "reference"})
        assert ops.report == tuple(f"{op}: reference" for op in OP_NAMES)

    def test_all_falls_through_where_it_is_not_written_and_says_so(self):
        report = select(prefer={"all": "torch"}).report
        assert "apply_rope: reference (torch: not written for this op)" in report
        assert "attention: torch" in report

    def test_one_op_wins_over_all(self):
        report = select(prefer={"all": "reference", "attention": "torch"}).report
        assert "attention: torch" in report
        assert "experts: reference" in report

    def test_unknown_op(self):
        with pytest.raises(BackendError, match="unknown op 'router'; expected 'all' or one of"):
            select(prefer={"router": "torch"})

    def test_unknown_backend_lists_the_known_ones(self):
        with pytest.raises(
            BackendError, match="experts=fast: no such backend; experts has native, training, tor"
        ):
            select(prefer={"experts": "fast"})

    def test_unknown_backend_for_all(self):
        with pytest.raises(BackendError, match="=fast: no such backend"):
            select(prefer={"all": "fast"})

    def test_backend_of_another_op_is_refused_when_named(self):
        with pytest.raises(BackendError, match="apply_rope=torch: no such backend"):
            select(prefer={"apply_rope": "torch"})


class TestUnfit:
    """With an implementation that never fits in front of the others."""

    @pytest.fixture(autouse=True)
    def picky(self, monkeypatch):
        def load():
            raise AssertionError("an implementation that does not fit must not be loaded")

        impl = Impl(backend="picky", load=load, unfit=lambda spec: f"no {spec.device} kernel.")
        monkeypatch.setitem(IMPLS, "experts", (impl, *IMPLS["experts"]))

    def test_default_falls_through_with_the_reason(self):
        assert "experts: torch (picky: no cpu kernel.)" in select().report

    def test_named_is_an_error_with_the_reason_and_the_remedy(self):
        with pytest.raises(BackendError) as caught:
            select(prefer={"experts": "picky"})
        assert str(caught.value) == (
            "experts=picky: no cpu kernel. Leave it out to choose automatically."
        )


class TestEnvironment:
    def test_pairs(self, monkeypatch):
        monkeypatch.setenv("QNEXT_OPS", "experts=reference, attention = torch,")
        report = select().report
        assert "experts: reference" in report
        assert "attention: torch" in report

    def test_argument_wins(self, monkeypatch):
        monkeypatch.setenv("QNEXT_OPS", "experts=reference")
        assert "experts: torch" in select(prefer={"experts": "torch"}).report

    def test_a_word_without_a_backend(self, monkeypatch):
        monkeypatch.setenv("QNEXT_OPS", "reference")
        with pytest.raises(BackendError, match="QNEXT_OPS: expected op=backend, found 'reference'"):
            select()

    def test_unknown_op(self, monkeypatch):
        monkeypatch.setenv("QNEXT_OPS", "expert=reference")
        with pytest.raises(BackendError, match="unknown op 'expert'"):
            select()

    def test_empty(self, monkeypatch):
        monkeypatch.setenv("QNEXT_OPS", "")
        assert select().report == select(OpSpec()).report


class TestTraining:
    def test_backward_passes_by_hand_are_taken_where_gradients_are_asked_for(self):
        report = select(OpSpec(grad=True)).report
        for op in ("causal_conv", "gated_delta_whole", "rms_norm_gated"):
            assert f"{op}: training" in report
        assert not any("training" in line for line in select(OpSpec()).report)

    def test_native_passes_come_first_where_they_are_built(self, monkeypatch):
        found = {line.partition(":")[0]: line for line in select(OpSpec(grad=True)).report}
        for op in ("experts", "attention", "delta_layer"):
            expected = (
                "native"
                if native.unfit_for_training() is None
                else "(native: the native kernels are"
            )
            assert expected in found[op]
        monkeypatch.setattr(
            native, "unfit_for_training", lambda: "the native kernels are not installed."
        )
        report = select(OpSpec(grad=True)).report
        assert "experts: training (native: the native kernels are not installed.)" in report
        assert "delta_layer: reference (native: the native kernels are not installed.)" in report
        assert not any("native" in line for line in select(OpSpec()).report)

    @pytest.mark.parametrize(
        "prefer", [{"causal_conv": "reference"}, {"all": "training"}, {"delta_layer": "reference"}]
    )
    def test_a_layer_is_not_joined_when_one_of_its_ops_is_named(self, prefer):
        assert select(OpSpec(grad=True), prefer).delta_layer is None

    def test_named_for_serving_they_are_refused(self):
        with pytest.raises(BackendError, match="experts=training: no gradients are asked for"):
            select(prefer={"experts": "training"})
