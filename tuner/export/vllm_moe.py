"""Tuned Triton launch settings in the manner of vLLM's fused-MoE configurations: one JSON file per operation.

vLLM names a file by what its kernel is made for: `E=128,N=1024,device_name=NVIDIA_H200[,dtype=…].json`.
Its keys are batch sizes M, of which the nearest is taken at run time; its values spell compile-time constants
in capitals and launch options as Triton does; a `triton_version` key is dropped before the rest is read.
(Source: vLLM's public fused_moe folder: file-name function, loader, shipped files.) Ours read the same way:

    op=sparse_attention,B=1,H=24,D=128,G=128,density=0.165,device_name=NVIDIA_H200,dtype=bfloat16.json
    op=sparse_mlp,B=1,H=1,C=12288,D=3072,G=128,density=0.3,device_name=NVIDIA_H200,dtype=bfloat16.json

    {"triton_version": "3.6.0", "4352": {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 64, "num_warps": 8}}

    op           the operation
    B, H         batch and heads
    C            columns: hidden neurons or keys; left out of self-attention, which has as many as rows
    D            head dimension, or model width
    G            rows of a group
    density      kept columns over all columns
    device_name  as the driver reports it, blanks as underscores
    dtype        of the tensors; always there

The key is the number of rows (tokens). Constants are in capitals, `block_m` is `BLOCK_SIZE_M`. Launch
options have Triton's names, `num_warps`, `num_stages`, `maxnreg` (null: the compiler's choice); an operation
of several launches says which it means, `up_num_warps`.

Only entries won by Triton can be told this way; the others are named in the warnings, as is where the dense
baseline is the faster (by verdict, or above a density crossover), for which the format has no place.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tuner.export.result import Export, ExportError

if TYPE_CHECKING:
    from chipmunk_kernels.problem import Problem
    from chipmunk_kernels.profiles import Profile

TRITON_OPTIONS = {"warps": "num_warps", "stages": "num_stages", "ctas": "num_ctas", "registers": "maxnreg"}
"""The last word of a launch option's name in our settings → Triton's name."""

WEIGHT_COLUMNS = ("sparse_mlp", "group_mean")
"""Operations whose columns are a weight's, hence fixed by the model and always part of the name."""


def file_name(problem: Problem, device_name: str) -> str:
    """The file that holds the settings for `problem` on a device."""
    parts: dict[str, Any] = {"op": problem.operation, "B": problem.batch, "H": problem.heads}
    if problem.operation in WEIGHT_COLUMNS or problem.columns != problem.rows:
        parts["C"] = problem.columns
    parts |= {"D": problem.width, "G": problem.group_size, "density": f"{problem.density:g}"}
    parts |= {"device_name": re.sub(r"[\s/\\,]+", "_", device_name), "dtype": problem.dtype}
    return ",".join(f"{name}={value}" for name, value in parts.items()) + ".json"


def spelled(setting: str) -> str:
    """A launch setting's name as vLLM spells it: `block_m` → `BLOCK_SIZE_M`, `max_registers` → `maxnreg`."""
    launch, _, last = setting.rpartition("_")
    if last not in TRITON_OPTIONS:
        return re.sub(r"^BLOCK(?=_|$)", "BLOCK_SIZE", setting.upper())
    prefix = "" if launch in ("", "num", "max") else f"{launch}_"
    return prefix + TRITON_OPTIONS[last]


def _launch(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as vLLM spells them. Our 0 registers, no cap, is Triton's None."""
    named = ((spelled(name), value) for name, value in settings.items())
    return {name: value or None if name.endswith("maxnreg") else value for name, value in named}


def export(profile: Profile) -> Export:
    """Every Triton entry of the profile, one file per operation and fixed dimensions.

    Raises:
        ExportError: the profile has no device name or no entry that Triton won.
    """
    device_name = profile.device.get("name")
    if not device_name:
        raise ExportError(f"{profile.path or 'profile'}: names no device; run chipmunk-tune where it is for")
    tables: dict[str, dict[int, dict[str, Any]]] = {}
    warnings = []
    for entry in profile.entries:
        if entry.backend != "triton":
            warnings.append(f"{entry.problem.key}: won by {entry.backend}, which this format cannot express")
            continue
        table = tables.setdefault(file_name(entry.problem, device_name), {})
        if entry.problem.rows in table:
            warnings.append(f"{entry.problem.key}: listed twice in the profile, the first is kept")
            continue
        table[entry.problem.rows] = _launch(entry.settings)
        if entry.evidence.get("verdict") == "dense is better":
            warnings.append(f"{entry.problem.key}: its verdict, dense is better, is lost")
        if entry.density_crossover is not None:
            warnings.append(f"{entry.problem.key}: its density crossover {entry.density_crossover:g} is lost")
    if not tables:
        raise ExportError(
            f"{profile.path or 'profile'}: none of its {len(profile.entries)} kernel entries is Triton's, "
            "and this format holds nothing else; tune on a GPU with chipmunk-tune first"
        )
    if profile.policies:
        warnings.append(
            f"policies: {', '.join(sorted(profile.policies))} stay behind; use --to chipmunk for them"
        )
    version = profile.toolchain.get("triton")
    return Export({name: _text(table, version) for name, table in sorted(tables.items())}, tuple(warnings))


def _text(table: dict[int, dict[str, Any]], triton_version: Any) -> str:
    document: dict[str, Any] = {"triton_version": str(triton_version)} if triton_version else {}
    document |= {str(rows): table[rows] for rows in sorted(table)}
    return json.dumps(document, indent=4) + "\n"
