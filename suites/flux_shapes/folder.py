"""Write a FLUX pipeline as a folder that `FluxPipeline.from_pretrained` loads offline, and judge its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 20_000_000


def write_folder(pipe: Any, folder: Path) -> None:
    """Save the pipeline, with the tokenizer class names that FluxPipeline is declared with.

    The text encoders are declared float32 whatever the stored dtype: without a dtype from the caller,
    transformers takes this declaration and diffusers takes float32, and the two must agree.
    """
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        config = folder / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["tokenizer"][1], entries["tokenizer_2"][1] = "CLIPTokenizer", "T5TokenizerFast"
    index.write_text(json.dumps(entries, indent=2) + "\n")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
