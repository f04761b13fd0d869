"""What training devices can do at most: the denominators of MFU, and memory. Torch only.

Dense numbers, without the vendors' "sparsity". Sources: NVIDIA's data sheets (V100, T4, A100, A10, A10G, A40, L4, L40,
L40S, H100, H200, RTX A6000, RTX 6000 Ada; Blackwell: B200, GB200); the appendices of its white papers on GA102 (RTX
3090), Ada (RTX 4090) and RTX Blackwell (RTX 5090), where bf16 is that with fp32 accumulation; AMD's data sheets of
MI300X and MI325X.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

import torch


@dataclass(frozen=True)
class Device:
    """A training device.

    Attributes:
        name: on the command line. pattern: what torch calls it, in full.
        bf16, tf32, fp32: dense peak in TFLOP/s, None where there is no such unit; fp32 without tensor cores.
        memory: GiB. link: GB/s in one direction to the other devices of its machine, NVLink, xGMI or PCIe.
    """

    name: str
    pattern: str
    bf16: float | None
    tf32: float | None
    fp32: float
    memory: int
    link: int

    def peak_flops(self, mixed_precision: str) -> float | None:
        """FLOP/s of matrix products at most, under `"bf16"` or `"no"`; None if the device has no units for it.

        `"no"` is fp32, or TF32 where `torch.set_float32_matmul_precision` allows it.
        """
        tf32 = self.tf32 if torch.get_float32_matmul_precision() != "highest" else None
        peak = self.bf16 if mixed_precision == "bf16" else tf32 or self.fp32
        return None if peak is None else peak * 1e12


DEVICES = {
    device.name: device
    for device in (
        #      name            torch's name                        bf16    tf32    fp32   GiB  GB/s
        Device("gb200", r"NVIDIA GB200.*", 2500, 1250, 80, 186, 900),
        Device("b200", r"NVIDIA B200", 2250, 1125, 75, 180, 900),
        Device("h200", r"NVIDIA H200", 989.4, 494.7, 66.9, 141, 450),
        Device("h200-nvl", r"NVIDIA H200 NVL", 835.5, 417.5, 60, 141, 450),
        Device("gh200", r"NVIDIA GH200.*", 989.4, 494.7, 66.9, 96, 450),
        Device("h100", r"NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9, 80, 450),
        Device("h100-nvl", r"NVIDIA H100 NVL", 835.5, 417.5, 60, 94, 300),
        Device("h100-pcie", r"NVIDIA H100 PCIe", 756, 378, 51, 80, 64),
        Device("a100", r"NVIDIA A100-SXM4-80GB", 312, 156, 19.5, 80, 300),
        Device("a100-40gb", r"NVIDIA A100-SXM4-40GB|A100-SXM4-40GB", 312, 156, 19.5, 40, 300),
        Device("a100-pcie", r"NVIDIA A100 80GB PCIe", 312, 156, 19.5, 80, 32),
        Device("a100-pcie-40gb", r"NVIDIA A100-PCIE-40GB|A100-PCIE-40GB", 312, 156, 19.5, 40, 32),
        Device("l40s", r"NVIDIA L40S", 362, 183, 91.6, 48, 32),
        Device("l40", r"NVIDIA L40", 181, 90.5, 90.5, 48, 32),
        Device("l4", r"NVIDIA L4", 121, 60, 30.3, 24, 32),
        Device("a10", r"NVIDIA A10", 125, 62.5, 31.2, 24, 32),
        Device("a10g", r"NVIDIA A10G", 70, 35, 35, 24, 32),
        Device("a40", r"NVIDIA A40", 149.7, 74.8, 37.4, 48, 32),
        Device("rtx-a6000", r"NVIDIA RTX A6000", 154.8, 77.4, 38.7, 48, 32),
        Device("rtx-6000-ada", r"NVIDIA RTX 6000 Ada Generation", 364.2, 182.1, 91.1, 48, 32),
        Device("rtx-5090", r"NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8, 32, 64),
        Device("rtx-4090", r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, 24, 32),
        Device("rtx-3090", r"NVIDIA GeForce RTX 3090", 71, 35.6, 35.6, 24, 32),
        Device("v100", r"Tesla V100-SXM2-32GB.*", None, None, 15.7, 32, 150),
        Device("v100-16gb", r"Tesla V100-SXM2-16GB", None, None, 15.7, 16, 150),
        Device("t4", r"(NVIDIA )?Tesla T4", None, None, 8.1, 16, 16),
        Device("mi325x", r"AMD Instinct MI325X.*", 1307.4, 653.7, 163.4, 256, 448),
        Device("mi300x", r"AMD Instinct MI300X.*", 1307.4, 653.7, 163.4, 192, 448),
    )
}


def named_device(name: str) -> Device:
    """A device by its name in `DEVICES`, in any case.

    Raises:
        ValueError: an unknown name.
    """
    key = name.lower()
    if key not in DEVICES:
        near = get_close_matches(key, DEVICES, n=1)
        hint = f"did you mean {near[0]!r}? Known are" if near else "known are"
        raise ValueError(f"The device {name!r} is not in the table of peaks; {hint} {', '.join(DEVICES)}.")
    return DEVICES[key]


def find_device(torch_name: str) -> Device | None:
    """The device that torch calls so; None for one that is not in the table, or a slice of one (MIG)."""
    return next((device for device in DEVICES.values() if re.fullmatch(device.pattern, torch_name)), None)


def known_device(device: torch.device) -> Device | None:
    """What the table knows of this device, None for CPUs and others that are not in it."""
    return find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Dense peak FLOP/s of a device under `"bf16"` or `"no"`; None for CPUs and devices that are not in the table."""
    known = known_device(device)
    return None if known is None else known.peak_flops(mixed_precision)
