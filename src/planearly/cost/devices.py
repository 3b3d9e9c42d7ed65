"""Devices: what the data sheet promises, and what `planearly calibrate` measured.

A measured device takes precedence over the data sheet. How much of the peak a training step
reaches depends on the model's width: matrix products grow with its square, the traffic between
them with the width itself. So 1 / utilisation is taken as linear in 1 / width,

    seconds per token = FLOPs / rate x (a + b / d_model).

For a data-sheet device, a and b come from the paper's Table 2 (A100: GPU-hours per 1B tokens of
training 2.2 and 7.7, of inference 0.61 and 2.54, at widths 1,024 and 2,816; least squares of the
four log ratios, all within 10%), and for Hopper and what came after it from our own training steps
on an H200 (docs/benchmarks.md: widths 320 to 2,816, within 12%); b is scaled by the device's ratio
of peak rate to memory bandwidth. For a calibrated one they come from its own measured steps.

A step of a small model on a GPU takes as long as launching its kernels does, whatever its size.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from planearly import files
from planearly.errors import UserError

PAPER_A, PAPER_B = 1.2465, 1545.2
"""Fit to the paper's Table 2 with our FLOP counts (tests/cost/test_cost_model.py repeats it)."""

HOPPER_A, HOPPER_B = 1.3012, 837.07
"""Fit to :data:`HOPPER_STEPS` (tests/cost/test_cost_model.py repeats it)."""
HOPPER_STEPS = ((320, 2.245e14), (512, 3.579e14), (1024, 5.149e14), (2816, 5.632e14))
"""Width and FLOP/s of training steps on one H200: 10M, 34M, 126M and 771M parameters."""
LAUNCH = 3e-3
"""Seconds per layer, and once beside, that launching a training step's kernels takes on a GPU's
host: 8.6 ms of two layers and 21 ms of six were measured."""

_A100_BALANCE = 312e12 / 2.039e12
_H200_BALANCE = 989e12 / 4.8e12


@dataclass(frozen=True)
class Projection:
    """What a calibration measured of a projected network: seconds, and what they belong to."""

    seconds: float
    """That a step took longer than the plain model's; not below 0."""
    shape: dict[str, Any]
    projected: dict[str, Any]
    preset: str
    """Optimiser."""


@dataclass(frozen=True)
class Device:
    """A device to plan for; rates in FLOP/s, memory in bytes, bandwidth in bytes/s."""

    name: str
    peak: float | None
    """Dense matrix rate of the data sheet: bfloat16, or float32 where the device has none."""
    memory: float | None
    bandwidth: float | None
    source: str
    a: float
    b: float
    rate: float
    """What a and b refer to: the measured matrix rate if there is one, else the peak."""
    projection_overhead: float | None = None
    """Measured time per token of a projected network over its plain model's, if calibrated."""
    projection: Projection | None = None
    """What that is a ratio of; None also of calibrations that do not tell."""
    calibrated: bool = False
    kind: Literal["cuda", "cpu"] = "cuda"
    bf16: bool = True
    """Whether the rates are of training with its matrix products in bfloat16; else in float32."""
    links: float | None = None
    """Bytes/s that a device sends to others of its machine, and as many that it receives."""
    launch: float = 0.0
    """Least seconds of a training step: for each layer, and once beside."""
    named_precision: bool = False
    """Whether a recipe named the precision in which it was measured."""
    sharing: int = 1
    """Trainings side by side whose rates together these are."""
    stands_in_for: str | None = None
    """What the user named, where nothing is known about that: hours are this device's instead."""

    @property
    def label(self) -> str:
        """Its name for readers, marked where it only stands in for another."""
        if self.stands_in_for is None:
            return self.name
        return f"{self.name}, in place of '{self.stands_in_for}', which was not measured"

    def told_of_standing_in(self) -> str:
        """That hours are this device's in place of another's, and what to do about it."""
        assert self.stands_in_for is not None
        near = did_you_mean(self.stands_in_for)
        return (f"nothing is known about '{self.stands_in_for}'{f' ({near}?)' if near else ''}: "
                f"FLOPs are exact, hours are those of {self.name}"
                + (", and a processor takes longer" if self.kind == "cpu" else "")
                + "; `planearly calibrate` there, a minute of real steps, replaces them by "
                  "measured ones")

    def told_of_precision(self, wanted: bool | None) -> str:
        """What to know of hours where training computes in bfloat16 or not as ``wanted`` says, or
        as suits the device (None); "" if nothing."""
        rate = "bfloat16" if self.bf16 else "float32"
        if wanted is not None and wanted != self.bf16:
            return (f"hours are at the rate of {rate}, and the recipe names another precision: "
                    "`planearly calibrate` there with this recipe measures that")
        if wanted is None and self.named_precision:
            return (f"hours are at the rate of {rate}, which the recipe of the calibration named: "
                    "`planearly calibrate` with a recipe that names none measures what suits it")
        if wanted is None and not self.bf16:
            return (f"{self.name} has no fast bfloat16: training computes in float32 there, and "
                    f"hours are at that rate ({self.rate / 1e12:.3g} TFLOP/s)")
        return ""

    def utilisation(self, d_model: int) -> float:
        """Share of ``rate`` that a step of a model of this width reaches."""
        return 1.0 / (self.a + self.b / d_model)

    def seconds(self, flops: float, d_model: int) -> float:
        """Device-seconds of this many operations of a model of this width."""
        return flops / (self.rate * self.utilisation(d_model))

    def least_seconds(self, steps: float, layers: int) -> float:
        """Device-seconds under which no number of training steps is done, however small."""
        return steps * self.launch * (layers + 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sheet:
    """One row of the data-sheet table."""

    name: str
    teraflops: float
    gigabytes: float
    gigabytes_per_second: float
    source: str
    pattern: str = ""
    """Regular expression that finds the device in what the driver calls it."""
    keys: tuple[str, ...] = field(default=())
    bf16: bool = True
    """False: ``teraflops`` are float32, in which training runs where bfloat16 is missing."""
    hopper: bool = False
    """Of the generation that was measured, or a later one."""
    links: float = 32
    """GB/s in one direction to other devices of the machine, by the same data sheet: half of its
    "interconnect" (NVLink, Infinity Fabric, else PCIe x16), which counts both directions. 32 is
    PCIe 4.0."""


SHEETS = [
    Sheet("A100-80GB", 312, 80, 2039, "NVIDIA A100 data sheet, SXM 80 GB", r"\bA100\b.*80GB",
          ("a100", "a100-80gb"), links=300),
    Sheet("A100-40GB", 312, 40, 1555, "NVIDIA A100 data sheet, 40 GB", r"\bA100\b", ("a100-40gb",),
          links=300),
    Sheet("H100-PCIe", 756, 80, 2000, "NVIDIA H100 data sheet, PCIe, without sparsity",
          r"H100.*PCIe", ("h100-pcie",), links=64, hopper=True),
    Sheet("H100", 989, 80, 3350, "NVIDIA H100 data sheet, SXM, without sparsity", r"H100",
          ("h100", "h100-sxm"), links=450, hopper=True),
    Sheet("H200", 989, 141, 4800, "NVIDIA H200 data sheet, SXM, without sparsity", r"H200",
          ("h200",), links=450, hopper=True),
    Sheet("B200", 2250, 180, 8000, "NVIDIA HGX B200 data sheet, per GPU, without sparsity",
          r"B200", ("b200",), links=900, hopper=True),
    Sheet("L40S", 362, 48, 864, "NVIDIA L40S data sheet, without sparsity", r"L40S", ("l40s",)),
    Sheet("L40", 181, 48, 864, "NVIDIA L40 data sheet, without sparsity", r"L40", ("l40",)),
    Sheet("L4", 121, 24, 300, "NVIDIA L4 data sheet, without sparsity", r"\bL4\b", ("l4",)),
    Sheet("A10G", 70, 24, 600, "NVIDIA A10G data sheet, without sparsity", r"A10G", ("a10g",)),
    Sheet("A10", 125, 24, 600, "NVIDIA A10 data sheet, without sparsity", r"\bA10\b", ("a10",)),
    Sheet("A40", 149.7, 48, 696, "NVIDIA A40 data sheet, without sparsity", r"\bA40\b", ("a40",)),
    Sheet("RTX-A6000", 154.8, 48, 768, "NVIDIA RTX A6000 data sheet, without sparsity",
          r"RTX A6000", ("rtx-a6000", "a6000")),
    Sheet("RTX-5090", 209.5, 32, 1792, "NVIDIA RTX Blackwell architecture paper, fp32 accumulate",
          r"RTX 5090", ("rtx-5090", "rtx5090", "5090"), links=64),
    Sheet("RTX-4090", 165.2, 24, 1008, "NVIDIA Ada architecture paper, fp32 accumulate",
          r"RTX 4090", ("rtx-4090", "rtx4090", "4090")),
    Sheet("RTX-3090", 71, 24, 936, "NVIDIA GA102 architecture paper, fp32 accumulate",
          r"RTX 3090", ("rtx-3090", "rtx3090", "3090")),
    Sheet("V100-32GB", 15.7, 32, 900, "NVIDIA V100 data sheet, SXM2 32 GB, float32",
          r"V100.*32GB", ("v100-32gb",), bf16=False, links=150),
    Sheet("V100", 15.7, 16, 900, "NVIDIA V100 data sheet, SXM2 16 GB, float32",
          r"V100", ("v100", "v100-16gb"), bf16=False, links=150),
    Sheet("T4", 8.1, 16, 320, "NVIDIA T4 data sheet, float32", r"\bT4\b", ("t4",), bf16=False,
          links=16),
    Sheet("MI300X", 1307, 192, 5300, "AMD MI300X data sheet, without sparsity", r"MI300X",
          ("mi300x",), links=448),
    Sheet("MI250X", 383, 128, 3277, "AMD MI250X data sheet, both dies", r"MI250X", ("mi250x",),
          links=400),
]


def in_bf16(precision: str | None) -> bool | None:
    """Whether a recipe's ``precision`` names bfloat16; None: it leaves that to the device."""
    return {"bf16": True, "fp32": False}.get(precision or "auto")


def find(name: str | None = None, bf16: bool | None = None, sharing: int = 1) -> Device:
    """The device of this name: calibrated if it is, else from the data sheets.

    Args:
        name: a key of the table (``a100``), what the driver calls a device, or None or ``here``
            for this machine's own.
        bf16: whether training computes in bfloat16; None: as suits the device.
        sharing: trainings that have it together.

    What it was calibrated with may be another precision, and one training alone: the device says
    so (``bf16``, ``sharing``).

    Raises:
        UserError: neither calibrated nor in the table.
    """
    asked = _asked(name)
    if (found := _known(asked, bf16, sharing)) is not None:
        return found
    hint = f"{hint}? If not, run" if (hint := did_you_mean(asked)) else "run"
    raise UserError(
        f"nothing is known about the device '{asked}': {hint} `planearly calibrate` on it "
        f"(a minute of real steps), or choose from {', '.join(row.keys[0] for row in SHEETS)}"
    )


def find_or_nearest(name: str | None = None, bf16: bool | None = None,
                    sharing: int = 1) -> Device:
    """:func:`find`, or the nearest device that is known, marked as standing in.

    Nearest to a name is the name most like it, else the paper's A100; to this machine's own GPU
    the one of most similar memory; to its processor another one that was calibrated, else the
    slowest data sheet. Memory, and the kind of device, are this machine's own where it is asked
    for: what fits is then true, and hours alone are another's.
    """
    asked = _asked(name)
    if (found := _known(asked, bf16, sharing)) is not None:
        return found
    if asked != here():
        near = _alike(asked)
        return replace(from_sheet(find_sheet(near[0] if near else "a100") or SHEETS[0]),
                       stands_in_for=asked)
    import torch

    from planearly import parallel

    memory = memory_here()
    device = parallel.device()
    if torch.cuda.is_available():
        sheet = min(SHEETS, key=lambda s: abs(s.gigabytes * 1e9 - (memory or 0)))
        found = from_sheet(sheet)
    else:
        found = next((d for d in _calibrated() if d.kind == "cpu" and d.sharing == 1
                      and not d.named_precision),
                     from_sheet(min(SHEETS, key=lambda s: s.teraflops)))
    return replace(found, stands_in_for=asked, memory=memory, calibrated=False,
                   kind="cuda" if device.type == "cuda" else "cpu",
                   bf16=parallel.bf16_is_fast(device))


def did_you_mean(asked: str) -> str:
    """``did you mean 'a100'``, or nothing."""
    near = _alike(asked)
    return f"did you mean '{near[0]}'" if near else ""


def _asked(name: str | None) -> str:
    return here() if name is None or name.lower() == "here" else name


def _alike(asked: str) -> list[str]:
    known = [key for row in SHEETS for key in row.keys]
    return difflib.get_close_matches(asked.lower(), known, 1, 0.6)


def _known(asked: str, bf16: bool | None, sharing: int) -> Device | None:
    calibration = find_calibration(asked, bf16, sharing)
    sheet = find_sheet(asked)
    if calibration is not None:
        return from_calibration(calibration, sheet)
    return from_sheet(sheet) if sheet is not None else None


def _calibrated() -> list[Device]:
    files_here = sorted(calibration_folder().glob("*.json"))
    return [from_calibration(measured := _checked(file), find_sheet(measured["device"]))
            for file in files_here]


def find_sheet(name: str) -> Sheet | None:
    """The data-sheet row for a key or a driver's name, or None."""
    key = name.strip().lower().replace(" ", "-").removeprefix("nvidia-")
    for sheet in SHEETS:
        if key in sheet.keys:
            return sheet
    if re.search(r"nvidia|geforce|tesla|radeon|instinct|amd", name, re.IGNORECASE):
        for sheet in SHEETS:
            if re.search(sheet.pattern, name, re.IGNORECASE):
                return sheet
    return None


def from_sheet(sheet: Sheet) -> Device:
    """A device that was not calibrated: the data sheet's rates, the utilisation of its kind."""
    peak, bandwidth = sheet.teraflops * 1e12, sheet.gigabytes_per_second * 1e9
    a, b, balance = (HOPPER_A, HOPPER_B, _H200_BALANCE) if sheet.hopper \
        else (PAPER_A, PAPER_B, _A100_BALANCE)
    return Device(
        name=sheet.name, peak=peak, memory=sheet.gigabytes * 1e9, bandwidth=bandwidth,
        source=f"{sheet.source}; utilisation as "
               + ("measured on an H200" if sheet.hopper else "in the paper's Table 2"),
        a=a, b=b * (peak / bandwidth) / balance, rate=peak, bf16=sheet.bf16,
        links=sheet.links * 1e9, launch=LAUNCH,
    )


def from_calibration(measured: dict[str, Any], sheet: Sheet | None) -> Device:
    """A device as measured: its matrix rate, and a curve through its measured steps."""
    rate = float(measured["matmul_flops"])
    points = [(s["d_model"], rate / s["flops_per_second"])
              for name, s in measured["shapes"].items() if name != "pn"]
    a, b = _through(points)
    overhead = projection = None
    if pn := measured["shapes"].get("pn"):
        plain = measured["shapes"]["slm"]["tokens_per_second"]
        overhead = plain / pn["tokens_per_second"]
        if "projected" in pn:  # older ones do not tell, nor tokens of a step
            more = pn["step_tokens"] * (1 / pn["tokens_per_second"] - 1 / plain)
            projection = Projection(max(more, 0.0), pn["shape"], pn["projected"],
                                    pn["settings"]["optimizer"]["preset"])
    return Device(
        name=measured["device"], peak=sheet.teraflops * 1e12 if sheet else None,
        memory=measured.get("memory") or (sheet.gigabytes * 1e9 if sheet else None),
        bandwidth=measured.get("bandwidth"), source=f"calibrated {measured['when']}",
        a=a, b=b, rate=rate, projection_overhead=overhead, projection=projection,
        calibrated=True,
        # older calibrations do not tell: processors are named with the number of their cores
        kind=measured.get("kind")
        or ("cpu" if re.search(r" x\d+$", measured["device"]) else "cuda"),
        bf16=_bf16(measured), named_precision=_named(measured),
        sharing=measured.get("sharing", 1),
        links=sheet.links * 1e9 if sheet else None,
    )


def _through(points: list[tuple[int, float]]) -> tuple[float, float]:
    """a and b of 1/utilisation = a + b/width, neither negative, through one point or more."""
    import numpy as np
    from scipy.optimize import nnls

    widths, inverse = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(set(widths)) == 1:
        return float(inverse.mean()), 0.0
    design = np.stack([np.ones_like(widths), 1.0 / widths], axis=1) / inverse[:, None]
    (a, b), _ = nnls(design, np.ones_like(inverse))
    return float(a), float(b)


# This machine, and what was measured ------------------------------------------------------------

def here() -> str:
    """This machine's device as manifests name it: the GPU, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{_processor()} x{os.cpu_count()}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return match[1].strip()
    import platform

    return platform.processor() or platform.machine() or "processor"


def memory_here() -> float | None:
    """Bytes of memory of this machine's device, or None if the system does not tell."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return None


def calibration_folder() -> Path:
    """Where calibrations lie: ``$PLANEARLY_CACHE``, or the user's cache folder."""
    return files.cache_folder() / "calibration"


def calibration_file(device: str, named: str = "", sharing: int = 1) -> Path:
    """Where what was measured on a device is kept.

    Args:
        named: the precision, where the recipe named one that the device would not have chosen.
        sharing: trainings side by side.
    """
    words = " ".join([device, named, f"shared by {sharing}" if sharing > 1 else ""])
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return calibration_folder() / f"{slug}.json"


def find_calibration(device: str, bf16: bool | None = None,
                     sharing: int = 1) -> dict[str, Any] | None:
    """What was measured on the device of this name (or of this table key), or None.

    The same device may have been measured in several ways. What trainings side by side did stands
    for no other number of them, and a precision that a recipe named not for what suits a device of
    the data sheets; one training alone, and another precision, stand in for what was not measured.

    Args:
        bf16, sharing: as of :func:`find`.
    """
    file, sheet = calibration_file(device), find_sheet(device)

    def usable(path: Path, same: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
        measured = _checked(path)
        other = _named(measured) and _bf16(measured) != bf16
        if (same(measured["device"]) and measured.get("sharing", 1) in (1, sharing)
                and not (sheet and other)):
            yield measured

    def fits(measured: dict[str, Any]) -> tuple[bool, bool, bool]:
        own = not _named(measured)
        return (own if bf16 is None else _bf16(measured) == bf16,
                measured.get("sharing", 1) == sharing, own)

    every = sorted(calibration_folder().glob("*.json"))
    named = re.compile(re.escape(file.stem) + r"(-bfloat16|-float32)?(-shared-by-\d+)?")
    found = [each for path in every if named.fullmatch(path.stem)
             for each in usable(path, lambda name: calibration_file(name) == file)]
    if not found and sheet is not None:
        found = [each for path in every
                 for each in usable(path, lambda name: find_sheet(name) is sheet)]
    return max(found, key=fits, default=None)


def _bf16(measured: dict[str, Any]) -> bool:
    """Whether the steps of a calibration were in bfloat16; older ones tell what their recipe named
    there alone."""
    kind = bool(measured.get("matmul_kind", "bfloat16") == "bfloat16")
    if "named_precision" in measured:
        return kind
    named = in_bf16(measured["shapes"]["slm"].get("settings", {}).get("precision"))
    return kind if named is None else named


def _named(measured: dict[str, Any]) -> bool:
    """Whether a calibration is of a precision that its recipe named and the device would not have
    chosen; older ones measured the products in what the device chooses."""
    kind = bool(measured.get("matmul_kind", "bfloat16") == "bfloat16")
    return bool(measured.get("named_precision", _bf16(measured) != kind))


def _checked(file: Path) -> dict[str, Any]:
    measured = files.read_json(file)
    try:
        named = isinstance(measured["device"], str) and measured["device"] and measured["when"]
        ok = named and measured["matmul_flops"] > 0 and all(
            s["d_model"] > 0 and s["flops_per_second"] > 0 and s["tokens_per_second"] > 0
            for s in measured["shapes"].values()) and "slm" in measured["shapes"]
    except (KeyError, TypeError, AttributeError):
        ok = False
    if not ok:
        raise UserError(f"{file} is not a calibration: delete it and run `planearly calibrate`")
    return measured
