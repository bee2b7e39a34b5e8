"""load_decoder: a folder -> the model an engine runs, on the fastest kernels that fit.

Native kernels run a checkpoint's own tensors where they lie in the mapped file, or packed ones;
PyTorch runs everything else. What was chosen stands in ``kernels`` of the model; why nothing
faster, in the log.
"""

import logging
import os

import torch

from qnext.config import ModelConfig
from qnext.errors import BackendError
from qnext.model.model import CausalLM
from qnext.model.native import NativeModel, unfit
from qnext.ops import Ops, OpSpec, invariant, select
from qnext.quantization import Bits
from qnext.weights.checkpoint import load_model
from qnext.weights.folder import resolve_model
from qnext.weights.formats import pack_q8
from qnext.weights.packed import is_packed, open_packed, pack_model

BACKENDS = ("auto", "native", "torch")
QUANTIZATIONS = {"int8": 8, "int4": 4}

_log = logging.getLogger(__name__)


def load_decoder(
    path: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    backend: str = "auto",
    quantization: str | Bits | None = None,
    batch_invariant: bool = False,
) -> CausalLM | NativeModel:
    """The model of a folder, ready for an engine; it has no gradients when it is native.

    ``backend`` is ``native``, ``torch`` or ``auto``: native where it fits, said in the log where it
    does not. ``quantization`` (``int8``, ``int4`` or the bits of every part) packs the weights of
    an unpacked folder while it is read; that and packed folders are what the native kernels are
    for, PyTorch unpacks them to ``dtype``. With ``batch_invariant`` a token's numbers depend on
    the tokens before it alone: on the native kernels they always do, PyTorch can promise it in
    float32 and bfloat16.

    Raises BackendError when what was asked for cannot run here, CheckpointError and ConfigError for
    the folder.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}.")
    if isinstance(quantization, str) and quantization not in QUANTIZATIONS:
        raise BackendError(
            f"quantization: expected one of {', '.join(QUANTIZATIONS)} or None, "
            f"found {quantization!r}."
        )
    folder = resolve_model(path)
    config = ModelConfig.from_file(folder)
    name = config.dtype if dtype == "auto" else dtype
    kind = getattr(torch, name, None)
    reason = unfit(config, kind, device) if isinstance(kind, torch.dtype) else None
    packed = is_packed(config)
    if packed and quantization is not None:
        raise BackendError(
            f"quantization: {folder} is packed already; leave it out, or start from the source."
        )
    if backend == "native" and reason is not None:
        raise BackendError(f"backend=native: {reason}")
    if backend == "torch" or reason is not None:
        if quantization is not None:
            raise BackendError(
                f"quantization needs the native kernels: {reason or 'backend is torch.'} "
                "Leave it out, or let the native kernels run."
            )
        if reason is not None and backend == "auto" and torch.device(device).type == "cpu":
            _log.warning("%s Everything runs on PyTorch, which is slower.", reason)
        ops = _invariant_ops(name, device) if batch_invariant else None
        return load_model(folder, dtype=dtype, device=device, ops=ops).eval()
    assert isinstance(kind, torch.dtype), name
    if packed:
        found = open_packed(folder)
    elif quantization is not None:
        bits = quantization if isinstance(quantization, Bits) else QUANTIZATIONS[quantization]
        found = pack_model(folder, bits)
    elif name == config.dtype:
        found = pack_model(folder, 16)
    else:
        return NativeModel.from_model(load_model(folder, dtype=dtype), pack_drafts=pack_q8)
    return NativeModel(found.config, found.weights, dtype=kind, pack_drafts=pack_q8)


def _invariant_ops(name: str, device: str) -> Ops:
    if name not in ("float32", "bfloat16"):
        raise BackendError(
            f"batch_invariant needs float32 or bfloat16 on PyTorch, found {name!r}: in other "
            "dtypes the rows of a batch are not independent there."
        )
    return select(OpSpec(dtype=getattr(torch, name), device=device), prefer=invariant())
