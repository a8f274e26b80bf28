"""What is known of accelerators: their peak, to compare a job's speed with."""

import torch

from pipelinejob_worker.protocol import Train

_PEAK_TERA_FLOPS = {
    # Dense, without sparsity, from the vendors' data sheets; half precision, and float32 on the matrix units' TF32
    # path or, where torch leaves that off, on the plain cores: torch's default.
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "B200": (2250.0, 80.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "V100": (125.0, 15.7),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return floating-point operations a second at ``spec.train.precision``; None for devices not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next(
        (peaks for part, peaks in _PEAK_TERA_FLOPS.items() if all(word in name for word in part.split())), None
    )
    return None if known is None else 1e12 * known[Train.model_fields["precision"].default == precision]
