"""The precision that a device computes fast: bf16, or float32 where bf16 would be emulated."""

import torch

BF16_OF_PROCESSORS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""Names that `torch.cpu.get_capabilities` gives bf16 products, on x86 and on ARM."""


def computes_bf16(device: torch.device | str) -> bool:
    """Whether a device has bf16 arithmetic, by its own account; False if it does not say."""
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        return getattr(torch, kind).is_bf16_supported(including_emulation=False)
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    return any(known.get(name, False) for name in BF16_OF_PROCESSORS) and onednn_has_bf16()


def onednn_has_bf16() -> bool:
    """Whether the library of PyTorch's products may use bf16 (`ONEDNN_MAX_CPU_ISA` limits it)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def chosen_precision(mixed_precision: str, device: torch.device | str) -> str:
    """`"no"` or `"bf16"`: the meaning of `"auto"` on a device; the other choices stay."""
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if computes_bf16(device) else "no"


def precision_note(chosen: str, device: torch.device | str) -> str:
    """The precision and its reason, in a line."""
    kind, has = torch.device(device).type, computes_bf16(device)
    if chosen == "bf16":
        why = "has it" if has else "only emulates it, which is slow"
        return f"Mixed precision is bf16: this {kind} {why}."
    lacks = "" if has else f", as this {kind} has no bf16 arithmetic"
    return f"Mixed precision is off{lacks}: all is computed in float32."


def autocast(mixed_precision: str, device: torch.device) -> torch.autocast:
    """The context in which a backbone computes."""
    bf16 = chosen_precision(mixed_precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, bf16)
