"""Native kernels: every test runs for each instruction set this processor has."""

import pytest

from qnext import native


def isas() -> list[str]:
    """Instruction sets that can run here; none without the extension."""
    if native.unfit() is not None:
        return []
    return list(native.ISAS[: native.ISAS.index(native.load().best_isa()) + 1])


@pytest.fixture(params=isas() or ["absent"])
def kernels(request):
    """The extension module with one instruction set chosen and two threads."""
    if request.param == "absent":
        pytest.skip(native.unfit())
    module = native.load()
    before, threads = module.isa(), module.threads()
    module.set_isa(request.param)
    module.set_threads(2)
    yield module
    module.set_isa(before)
    module.set_threads(threads)
